"""Epochs that leave out what is learned already: whom, how often, and that the others count for them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifarlab import build, train
from cifarlab.data.batches import in_batches
from cifarlab.data.prepare import prepare
from cifarlab.errors import RecipeError
from cifarlab.feed import TrainingBatch, make_batches
from cifarlab.pace import BySteps
from cifarlab.pruning import Pruned, Pruning
from cifarlab.recipe_sections import Prune
from cifarlab.train import EpochSums
from short_runs import CPU, make_dataset, recipe, run
from test_tricks import gradients, make_batch

IMAGES = 3000
ORDER = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(3))
SHARE = 0.25


def with_losses(losses: Tensor, section: Prune | None = None) -> Pruning:
    """Pruning that has seen images with these losses, of the first of two classes: log(1 + e^x) = loss."""
    pruning = Pruning(section or Prune(share=SHARE), seed=0, images=IMAGES, device=CPU)
    logits = torch.stack([torch.zeros_like(losses), losses.expm1().log()], 1)
    pruning.record(torch.arange(len(losses)), logits, torch.zeros(len(losses), dtype=torch.int64), 0.0)
    return pruning


def epoch(pruning: Pruning, number: int = 1, steps: int = 7, share: float = 0.5) -> Pruned:
    pruned = pruning.epoch(ORDER, number, steps=steps, share=share)
    assert pruned is not None
    return pruned


def test_images_below_the_mean_loss_sit_out_at_random_and_those_that_stay_count_for_them() -> None:
    losses = torch.full((IMAGES - 500,), 0.2)
    losses[1500:] = 2.0  # 1,500 are easy, 1,000 hard; of the last 500 no loss is known
    pruned = epoch(with_losses(losses))
    kept = torch.cat(pruned.batches)
    places = {sample: place for place, sample in enumerate(ORDER.tolist())}
    assert [places[sample] for sample in kept.tolist()] == sorted(places[sample] for sample in kept.tolist())
    assert set(range(1500, IMAGES)) <= set(kept.tolist())
    easy = kept[kept < 1500]
    assert len(easy) == pytest.approx(1500 * (1 - SHARE), abs=5 * (1500 * SHARE * (1 - SHARE)) ** 0.5)
    assert pruned.weights[easy].tolist() == pytest.approx([1 / (1 - SHARE)] * len(easy))
    assert set(pruned.weights[kept[kept >= 1500]].tolist()) == {1.0}
    assert len(pruned.batches) == 7
    assert max(map(len, pruned.batches)) - min(map(len, pruned.batches)) <= 1


def test_the_weighted_sum_is_that_of_all_images_in_expectation() -> None:
    """Any value of theirs, summed over many epochs; its standard error by the formula for independent draws."""
    generator = torch.Generator().manual_seed(0)
    losses, values = torch.rand(IMAGES, generator=generator) ** 3, torch.randn(IMAGES, generator=generator).double()
    pruning, sums = with_losses(losses), []
    for number in range(200):
        pruned = epoch(pruning, number)
        kept = torch.cat(pruned.batches)
        sums.append((values[kept] * pruned.weights[kept]).sum())
    easy = values[losses < losses.mean()]
    error = ((easy**2).sum() * SHARE / (1 - SHARE) / len(sums)).sqrt()
    assert torch.stack(sums).mean().item() == pytest.approx(values.sum().item(), abs=4 * error.item())


def test_a_draw_is_a_function_of_seed_and_epoch() -> None:
    losses = torch.rand(IMAGES, generator=torch.Generator().manual_seed(0))
    one, again, other = (torch.cat(epoch(with_losses(losses), number).batches).tolist() for number in (1, 1, 2))
    assert one == again != other


def test_all_images_are_used_where_no_loss_is_known_in_the_end_and_where_steps_would_be_too_small() -> None:
    losses = torch.rand(IMAGES, generator=torch.Generator().manual_seed(0))
    fresh = Pruning(Prune(), seed=0, images=IMAGES, device=CPU)
    assert fresh.epoch(ORDER, 0, steps=7, share=0.0) is None
    until = with_losses(losses, Prune(until=0.6))
    assert until.epoch(ORDER, 1, steps=7, share=0.59) is not None
    assert until.epoch(ORDER, 1, steps=7, share=0.6) is None
    assert with_losses(losses).epoch(ORDER, 1, steps=IMAGES // 2, share=0.5) is None
    assert with_losses(torch.full((IMAGES,), 0.5)).epoch(ORDER, 1, steps=7, share=0.5) is None  # nobody is below


def test_what_a_checkpoint_keeps_says_who_is_left_out() -> None:
    losses = torch.rand(IMAGES, generator=torch.Generator().manual_seed(0))
    pruning = with_losses(losses)
    kept = torch.cat(epoch(pruning).batches)
    state = pruning.state()
    assert state["weights"] is not None and state["losses"] is not None
    assert ORDER[state["weights"][ORDER] > 0].tolist() == kept.tolist()
    torch.testing.assert_close(state["losses"], losses)
    pruning.epoch(ORDER, 9, steps=7, share=0.99)
    assert pruning.state()["weights"] is None


def test_recorded_losses_are_those_of_the_images_with_the_recipes_smoothing() -> None:
    logits, labels = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 4, 1])
    pruning = Pruning(Prune(), seed=0, images=9, device=CPU)
    pruning.record(torch.tensor([7, 2, 0, 4]), logits, labels, 0.1)
    losses = pruning.state()["losses"]
    assert losses is not None
    for place, (sample, label) in enumerate(zip((7, 2, 0, 4), labels.tolist(), strict=True)):
        smooth = torch.full((5,), 0.1 / 5)
        smooth[label] += 0.9
        torch.testing.assert_close(losses[sample], -(smooth * F.log_softmax(logits[place], 0)).sum())
    assert losses[[1, 3, 5, 6, 8]].isnan().all()


# --- in the loss and in the loop ----------------------------------------------------------------


WEIGHTS = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1.0, 2.0, 4.0, 1.0])])
def test_an_image_of_weight_two_counts_as_two(mixed: bool, class_weights: Tensor | None) -> None:
    """Loss and gradient are those of a batch that holds it twice; in parts as well."""
    batch = make_batch(mixed)
    twice = torch.repeat_interleave(torch.arange(9), WEIGHTS.long())
    partners, share = (None if each is None else each[twice] for each in (batch.partners, batch.share))
    doubled = TrainingBatch(batch.inputs[twice], batch.labels[twice], partners, share)
    wanted = gradients(doubled, 1, class_weights)[:2]
    for accumulate in (1, 4):
        found = gradients(batch._replace(weights=WEIGHTS), accumulate, class_weights)[:2]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_training_accuracy_and_loss_count_images_by_their_weights() -> None:
    sums = EpochSums(CPU)
    logits, labels = F.one_hot(torch.tensor([0, 1, 1]), 2).float(), torch.tensor([0, 0, 1])
    weights = torch.tensor([2.0, 1.0, 1.0])
    sums.add(0, torch.tensor(3.0), logits, TrainingBatch(logits, labels, weights=weights), None)
    sums.add(1, torch.tensor(1.0), logits, TrainingBatch(logits, labels), None)
    assert sums.means() == pytest.approx(((3.0 * 4 + 1.0 * 3) / 7, (3 + 2) / 7))


SETTINGS = ("train.batch_size=30", "train.epochs=4", "augment.flip=alternating", "evaluate.test=false")


def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *settings: str) -> tuple[list[Any], list[TrainingBatch]]:
    """The epochs of a run, and its batches."""
    batches: list[TrainingBatch] = []

    def watched(*arguments: Any) -> Any:
        for batch in make_batches(*arguments):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(train, "make_batches", watched)
    log = run(tmp_path, *SETTINGS, *settings, monkeypatch=monkeypatch).train_log()
    losses = [(entry["train_loss"], entry["val_loss"]) for entry in log["epochs"]]
    assert log["images_per_second"] * log["train_time"] == pytest.approx(sum(len(batch.labels) for batch in batches))
    return losses, batches


def test_a_run_steps_as_often_on_fewer_images_and_on_all_of_them_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = "train.prune={share: 0.5, until: 0.7}"
    losses, batches = seen(monkeypatch, tmp_path / "1", pruned)
    again, _ = seen(monkeypatch, tmp_path / "2", pruned)
    streamed, _ = seen(monkeypatch, tmp_path / "3", pruned, "data.memory=1", "data.workers=0")
    assert losses == again == streamed
    whole, every = seen(monkeypatch, tmp_path / "4", "train.prune={share: 0.5, until: 0.001}")
    plain, _ = seen(monkeypatch, tmp_path / "5")
    assert whole == plain
    assert losses[0] == plain[0] and losses[1] != plain[1]

    steps = len(in_batches(torch.arange(180), 30))
    assert len(batches) == len(every) == 4 * steps
    images = [sum(len(batch.labels) for batch in batches[n * steps : (n + 1) * steps]) for n in range(4)]
    assert images[0] == images[3] == 180 and 90 < images[1] < 175 and 90 < images[2] < 175
    for number, batch in enumerate(batches):
        assert (batch.weights is not None) == (number // steps in (1, 2))


def test_an_epoch_that_is_begun_in_its_middle_goes_on_with_the_images_left() -> None:
    plan = recipe("train.batch_size=30", "train.prune={share: 0.5}")
    task = build.make_task(plan, prepare(make_dataset(), plan.data, 0), CPU, None, lambda _: None)

    def taught() -> Pruning:
        assert plan.train.prune is not None
        pruning = Pruning(plan.train.prune, 0, len(task.store), CPU)
        logits = torch.randn(len(task.store), 2, generator=torch.Generator().manual_seed(0))
        pruning.record(torch.arange(len(task.store)), logits, torch.zeros(len(logits), dtype=torch.int64), 0.0)
        return pruning

    whole = list(itertools.islice(make_batches(plan, task, 6, BySteps(100), taught()), 6))
    rest = list(itertools.islice(make_batches(plan, task, 8, BySteps(100), taught()), 4))
    for one, other in zip(whole[2:], rest, strict=True):
        assert torch.equal(one.inputs, other.inputs) and one.weights is not None and other.weights is not None
        assert torch.equal(one.weights, other.weights)


def test_pruned_batches_are_not_compiled() -> None:
    with pytest.raises(RecipeError, match=r"prune makes batches of many sizes, and numerics\.compile compiles for one"):
        recipe("train.prune={share: 0.5}", "train.numerics={dtype: float32, compile: true}")
    with pytest.raises(RecipeError, match=r"train\.prune\.share.*less than 1"):
        recipe("train.prune={share: 1}")
