"""What recipes can ask of the loop beyond a plain step: each against a formula by hand, or a property of the run."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifarlab import build
from cifarlab.data.batches import in_batches
from cifarlab.data.mixing import mix
from cifarlab.data.prepare import prepare
from cifarlab.evaluate import Classifier
from cifarlab.feed import TrainingBatch, make_batches, total_weight
from cifarlab.models import build_model
from cifarlab.numerics import exact
from cifarlab.pace import BySteps
from cifarlab.rundir import RunFolder
from cifarlab.train import EpochSums
from cifarlab.training_step import Backward, backward
from short_runs import CPU, Quiet, make_dataset, normalised, recipe, run, without_times

EVERY_STEP = ["train.checkpoint_every.steps=1", "train.keep=1000"]

EXACT = exact(torch.device("cpu"), channels_last_on_cpu=False)


def states(folder: RunFolder) -> list[dict[str, Any]]:
    """The checkpoint after each step, in order."""
    paths = sorted(folder.path.glob("step-*.pth"), key=lambda path: int(path.stem.partition("-")[2]))
    return [folder.load_checkpoint(path.name) for path in paths]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- the moving average ---


def test_the_average_follows_its_formula_buffers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "train.epochs=2", "train.ema=0.7", *EVERY_STEP, monkeypatch=monkeypatch)
    plan = folder.recipe()
    model = build_model(plan.model, classes=4, size=(32, 32), seed=0)
    average = {name: value.double() for name, value in model.state_dict().items()}
    found = states(folder)
    assert len(found) == 12
    for state in found:
        step = state["step"]
        decay = min(0.7, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        for name, value in state["model"].items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
            if "num_batches" not in name:
                torch.testing.assert_close(state["average"][name].double(), average[name], atol=1e-6, rtol=1e-5)
    assert changed(found[-1]["average"], found[-1]["model"]) >= {"conv1.weight", "bn1.running_mean", "head.bias"}


def test_best_pth_holds_whichever_validates_better_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    # Slow steps leave the average behind, steps that are too large are evened out by it.
    for number, rate in enumerate((1e-3, 1e-2, 1e-1)):
        noisy = make_dataset(noise=0.2)
        settings = ["train.epochs=4", "train.ema=0.8", "data.validation=0.3", f"optimizer.lr={rate}"]
        folder = run(tmp_path / str(number), *settings, dataset=noisy, monkeypatch=monkeypatch)
        log, state = folder.train_log(), folder.load_checkpoint("best.pth")
        offers = {
            (entry["epoch"], weights): (entry[f"{prefix}val_accuracy"], -entry[f"{prefix}val_loss"])
            for entry in log["epochs"]
            for prefix, weights in (("", "raw"), ("ema_", "ema"))
        }
        best = max(offers, key=lambda key: offers[key])
        assert (log["best_epoch"], log["best_weights"]) == best == (state["epoch"], state["weights"])
        assert log["best_val_accuracy"] == offers[best][0]
        saved = np.load(folder.path / "validation_predictions.npz")
        assert (saved["logits"].argmax(1) == saved["labels"]).mean() == pytest.approx(offers[best][0])
        seen.add(best[1])
    assert seen == {"raw", "ema"}


def test_without_validation_the_average_is_what_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["train.epochs=1", "data.validation=0", "train.ema=0.9", *EVERY_STEP]
    folder = run(tmp_path, *settings, monkeypatch=monkeypatch)
    last, best = states(folder)[-1], folder.load_checkpoint("best.pth")
    assert folder.train_log()["best_weights"] == "ema" == best["weights"]
    assert not changed(best["model"], last["average"]) and changed(best["model"], last["model"])


# --- the step ---


class Plain(nn.Module):
    """No BatchNorm: a part of a batch gives what the whole gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs)
        return output


def gradients(
    batch: TrainingBatch, accumulate: int, class_weights: Tensor | None, label_smoothing: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    model = Plain()
    plan = recipe("train.batch_size=9", f"train.accumulate={accumulate}", f"loss.label_smoothing={label_smoothing}")
    task: Any = SimpleNamespace(network=Classifier(model, model, None, 4, EXACT), class_weights=class_weights)
    loss, logits = backward(plan, task, batch)
    assert model.layer.weight.grad is not None
    return model.layer.weight.grad, loss, logits


def make_batch(mixed: bool) -> TrainingBatch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, 12, generator=generator)
    labels, partners = (torch.randint(0, 4, (9,), generator=generator) for _ in range(2))
    return (
        TrainingBatch(inputs, labels, partners, torch.rand(9, generator=generator))
        if mixed
        else TrainingBatch(inputs, labels)
    )


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 4.0, 1.0])])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 9])
def test_parts_of_a_batch_add_up_to_the_whole(accumulate: int, weights: Tensor | None, mixed: bool) -> None:
    """Uneven parts, class weights and mixed labels too; 8 images of 9 in parts of 2 leave one that joins the last."""
    whole, parts = (gradients(make_batch(mixed), count, weights) for count in (1, accumulate))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
    assert whole[2].shape == (9, 4)


def test_no_part_is_larger_than_it_needs_to_be() -> None:
    """That is what it saves memory by: 9 images in 4 parts are 3, 3 and 3."""
    model, sizes = Plain(), []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    plan = recipe("train.batch_size=9", "train.accumulate=4")
    task: Any = SimpleNamespace(network=Classifier(model, model, None, 4, EXACT), class_weights=None)
    backward(plan, task, make_batch(mixed=False))
    assert sizes == [3, 3, 3]


def small_memory(model: nn.Module, images: int) -> None:
    """Let a model run out of memory with more images than that."""

    def refuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    model.register_forward_pre_hook(refuse)


def test_where_memory_runs_out_a_batch_is_computed_in_more_parts_and_gives_the_same() -> None:
    batch, whole = make_batch(mixed=False), gradients(make_batch(mixed=False), 1, None, label_smoothing=0.0)
    model = Plain()
    small_memory(model, 3)
    plan = recipe("train.batch_size=9")
    network = Classifier(model, model, None, 4, EXACT)
    task: Any = SimpleNamespace(network=network, class_weights=None, device=CPU)
    fitting = Backward(plan, task, None)
    loss, logits = fitting(batch, 0)
    assert fitting.accumulate == 4 and model.layer.weight.grad is not None
    for one, other in zip((model.layer.weight.grad, loss, logits), whole, strict=True):
        torch.testing.assert_close(one, other)
    small_memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError):  # not even an image fits
        fitting(batch, 1)


def test_a_run_that_runs_out_of_memory_goes_on_in_parts_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build_model

    def smaller(*arguments: Any, **settings: Any) -> nn.Module:
        model = original(*arguments, **settings)
        small_memory(model.get_submodule("head"), 20)  # where BatchNorm has seen the batch already
        return model

    monkeypatch.setattr(build, "build_model", smaller)
    display = Quiet()
    folder = run(tmp_path, "evaluate.batch_size=50", display=display, monkeypatch=monkeypatch)
    assert folder.train_log()["accumulate"] == 2  # 32 images a step
    assert [line for line in display.said if "memory ran out" in line] == [
        "memory ran out: from here on a batch is computed in 2 parts"
    ]
    assert folder.train_log()["status"] == "finished"
    small = run(tmp_path / "parts", "train.accumulate=2", "evaluate.batch_size=13", monkeypatch=monkeypatch)
    assert folder.test_log() is not None
    assert without_times(folder.test_log() or {}) == without_times(small.test_log() or {})


def test_the_loss_of_mixed_images_is_that_of_mixed_labels() -> None:
    batch = make_batch(mixed=True)
    assert batch.partners is not None and batch.share is not None
    soft = batch.share[:, None] * F.one_hot(batch.labels, 5) + (1 - batch.share[:, None]) * F.one_hot(batch.partners, 5)
    gradient, loss, logits = gradients(batch, 1, None)
    model = Plain()
    wanted = F.cross_entropy(model(batch.inputs), soft, label_smoothing=0.1)
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, model.layer.weight.grad)
    torch.testing.assert_close(logits, model(batch.inputs).detach()[:, :4])


def test_a_mixed_image_is_right_where_its_heavier_label_is_found() -> None:
    sums = EpochSums(CPU)
    labels, partners, share = torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]), torch.tensor([0.7, 0.3, 0.7])
    said = F.one_hot(torch.tensor([0, 1, 1]), 2).float()
    sums.add(0, torch.tensor(1.0), said, TrainingBatch(torch.zeros(3), labels, partners, share), None)
    assert sums.means() == pytest.approx((1.0, 2 / 3))


def test_mixed_images_with_class_weights_are_a_weighted_mean() -> None:
    """By hand: each of an image's two labels with its share and the weight of its class."""
    batch, weights = make_batch(mixed=True), torch.tensor([0.5, 1.0, 2.0, 4.0, 1.0])
    assert batch.partners is not None and batch.share is not None
    _, loss, _ = gradients(batch, 1, weights, label_smoothing=0.0)
    log_probabilities = F.log_softmax(Plain()(batch.inputs), 1).detach()
    total = weight = 0.0
    for row in range(9):
        for label, share in ((batch.labels[row], batch.share[row]), (batch.partners[row], 1 - batch.share[row])):
            total -= float(share * weights[label] * log_probabilities[row, label])
            weight += float(share * weights[label])
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)
    assert float(total_weight(batch, weights)) == pytest.approx(weight, rel=1e-5)


def test_clipping_bounds_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD moves by learning rate times gradient, whose norm is at most 0.05 then."""
    sgd = ["optimizer.name=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0", "train.epochs=1", *EVERY_STEP]
    lengths = []
    for name, setting in (("clipped", "0.05"), ("free", "null")):
        folder = run(tmp_path / name, *sgd, f"train.clip_grad_norm={setting}", monkeypatch=monkeypatch)
        before = build_model(folder.recipe().model, classes=4, size=(32, 32), seed=0)
        names = [name for name, _ in before.named_parameters()]
        weights: dict[str, Tensor] = {name: value.detach() for name, value in before.named_parameters()}
        for state in states(folder):
            moved = torch.cat([(state["model"][name] - weights[name]).flatten() for name in names])
            lengths.append((name, float(moved.norm())))
            weights = state["model"]
    clipped = [length for name, length in lengths if name == "clipped"]
    assert clipped == pytest.approx([0.005] * len(clipped), rel=1e-3)
    assert max(length for name, length in lengths if name == "free") > 0.02


# --- freezing ---


def test_a_frozen_backbone_stands_still_and_then_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["train.epochs=1", "model.freeze_backbone.steps=3", *EVERY_STEP]
    folder = run(tmp_path, *settings, monkeypatch=monkeypatch)
    fresh = build_model(folder.recipe().model, classes=4, size=(32, 32), seed=0).state_dict()
    found = [state["model"] for state in states(folder)]
    assert changed(fresh, found[2]) == {"head.weight", "head.bias"}
    assert changed(found[2], found[3]) == set(fresh)  # BatchNorm's statistics as well


@pytest.mark.parametrize("cache", ["null", "float32", "bfloat16"])
def test_frozen_stages_never_change(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["train.epochs=2", "model.freeze_stages=1", f"model.cache={cache}", "optimizer.weight_decay=0.1"]
    folder = run(tmp_path, *settings, "model.freeze_backbone.steps=2", *EVERY_STEP, monkeypatch=monkeypatch)
    fresh = build_model(folder.recipe().model, classes=4, size=(32, 32), seed=0).state_dict()
    end = states(folder)[-1]["model"]
    still = {name for name in fresh if name.startswith(("conv1.", "bn1."))}
    assert len(still) == 7 and changed(fresh, end) == set(fresh) - still


def test_stages_freeze_late_and_nothing_is_different_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps: from the third on conv1, from the fifth on conv2 as well, with their BatchNorms' statistics."""
    settings = ["train.epochs=1", "train.ema=0.9", *EVERY_STEP]
    late = "model.freeze_late=[[0.3, 1], [0.6, 2]]"
    free, folder = (
        run(tmp_path / late, *settings, late, monkeypatch=monkeypatch) for late in ("model.freeze_late=null", late)
    )
    expected, found = ([state["model"] for state in states(run)] for run in (free, folder))
    every, first, both = set(found[0]), ("conv1.", "bn1."), ("conv1.", "bn1.", "conv2.", "bn2.")
    frozen = [(), (), first, first, both, both]
    assert len(found) == 6
    assert [changed(*pair) for pair in itertools.pairwise(found)] == [
        {name for name in every if not name.startswith(now)} if now else every for now in frozen[1:]
    ]
    assert not changed(expected[1], found[1]) and changed(expected[2], found[2])


VIEWS = [
    "augment={crop_padding: 2, flip: random, views: 2}",
    "model.freeze_stages=2",
    "train.epochs=4",
    "train.ema=0.9",
]


@pytest.fixture(scope="module")
def computed_every_time(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        return run(tmp_path_factory.mktemp("exact"), *VIEWS, "model.cache=null", monkeypatch=patch)


def test_a_float32_cache_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed_every_time: RunFolder
) -> None:
    """Two versions of each image, four epochs, the average and a validation pass: as if computed every time."""
    first = computed_every_time
    second = run(tmp_path, *VIEWS, "model.cache=float32", monkeypatch=monkeypatch)
    assert without_times(first.train_log()) == without_times(second.train_log())
    assert without_times(first.test_log() or {}) == without_times(second.test_log() or {})
    assert not changed(first.load_checkpoint("best.pth")["model"], second.load_checkpoint("best.pth")["model"])


def test_a_bfloat16_cache_is_close_and_its_size_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed_every_time: RunFolder
) -> None:
    rounded = run(tmp_path / "rounded", *VIEWS, monkeypatch=monkeypatch)
    small = run(tmp_path / "small", *VIEWS, "model.cache_memory=1", monkeypatch=monkeypatch)
    assert without_times(rounded.train_log()) == without_times(small.train_log())
    losses = [
        [entry["train_loss"] for entry in folder.train_log()["epochs"]] for folder in (computed_every_time, rounded)
    ]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


GROWING = [
    "model={name: timm:test_efficientnet, freeze_stages: 2}",
    "augment={flip: random, views: 1}",
    "evaluate.test=false",
]


def test_a_cache_is_for_one_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same versions of the same images come again in another resolution, and are others."""
    settings = [*GROWING, "train.resolution=[[0, 32], [0.5, 48]]", "train.epochs=4"]
    first, second = (
        run(tmp_path / cache, *settings, f"model.cache={cache}", monkeypatch=monkeypatch)
        for cache in ("null", "float32")
    )
    assert without_times(first.train_log()) == without_times(second.train_log())
    assert second.train_log()["frozen_stages"]["computed"] == 2 * 180 + 20 + 20


def test_what_comes_again_in_another_resolution_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of each of two resolutions takes no more memory than one epoch: that for the validation images."""
    bytes_taken = [
        run(tmp_path / name, *GROWING, *settings, monkeypatch=monkeypatch).train_log()["frozen_stages"]["bytes"]
        for name, settings in (
            ("one", ["train.resolution=48", "train.epochs=1"]),
            ("two", ["train.resolution=[[0, 32], [0.5, 48]]", "train.epochs=2"]),
        )
    ]
    assert bytes_taken[0] == bytes_taken[1] > 0


def test_what_will_not_come_again_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions in two epochs: of the training images nothing is kept, of the 20 for validation all."""
    settings = ["augment={flip: random, views: 2}", "model.freeze_stages=2", "train.epochs=2", "evaluate.test=false"]
    record = run(tmp_path / "a", *settings, monkeypatch=monkeypatch).train_log()["frozen_stages"]
    assert record["computed"] == 2 * 180 + 20 + 20 and record["recalled"] == 20 + 20
    longer = run(tmp_path / "b", *settings, "train.epochs=3", monkeypatch=monkeypatch).train_log()["frozen_stages"]
    assert longer["bytes"] == record["bytes"] * (20 + 180) / 20


def test_frozen_stages_without_versions_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["augment={flip: random}", "model.freeze_stages=2", "train.epochs=1"]
    first, second = (
        run(tmp_path / cache, *settings, f"model.cache={cache}", monkeypatch=monkeypatch)
        for cache in ("null", "bfloat16")
    )
    assert without_times(first.train_log()) == without_times(second.train_log())
    assert second.train_log()["frozen_stages"] is None


def test_all_but_the_head_can_be_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear probe, whose features have no height and width, is that of running the backbone every time."""
    settings = ["model.freeze_stages=4", "train.epochs=3", "model.cache=float32"]
    probe = run(tmp_path / "a", *settings, monkeypatch=monkeypatch)
    anew = run(tmp_path / "b", *settings, "model.cache=null", monkeypatch=monkeypatch)
    assert without_times(probe.train_log()) == without_times(anew.train_log())
    assert probe.train_log()["frozen_stages"]["computed"] == 180 + 20 + 20


@pytest.mark.parametrize(("settings", "versions"), [(VIEWS, 2), (["model.freeze_stages=2"], 1)])
def test_the_front_of_the_network_runs_once_for_each_version(
    settings: list[str], versions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without augmentation there is one version. Memory is taken for what there is, and no more."""
    from cifarlab.features import FrozenStages

    compute, images, sizes = FrozenStages._compute, [], set()

    def counting(self: FrozenStages, pixels: Tensor) -> Tensor:
        output = compute(self, pixels)
        images.append(len(pixels))
        sizes.add(output[0].numel() * output.element_size())
        return output

    monkeypatch.setattr(FrozenStages, "_compute", counting)
    log = run(tmp_path, *settings, "evaluate.test=false", monkeypatch=monkeypatch).train_log()
    # 180 training images, 20 validation images, and once the 20 that overfitting is measured on.
    assert sum(images) == versions * 180 + 20 + 20 == log["frozen_stages"]["computed"]
    assert log["frozen_stages"]["bytes"] == (versions * 180 + 20) * sizes.pop()


def test_the_cache_of_a_later_run_is_as_large_as_that_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the memory that was free at first: the process keeps what a run gives back, so less looks free then."""
    free = iter([4000, 1000])
    monkeypatch.setattr("cifarlab.machine.free_memory", lambda device: next(free))
    build._cache_memory.cache_clear()
    try:
        assert [build._cache_memory(CPU) for _ in range(2)] == [2000, 2000]
    finally:
        build._cache_memory.cache_clear()


# --- dropout ---


def test_what_dropout_draws_depends_on_seed_and_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarlab import training_step
    from cifarlab.seeds import derive_seed

    backward, drawn = training_step.backward, []

    def drawing(*arguments: Any) -> tuple[Tensor, Tensor]:
        drawn.append(torch.rand(3))
        return backward(*arguments)

    monkeypatch.setattr(training_step, "backward", drawing)
    run(tmp_path, "train.epochs=2", "evaluate.test=false", monkeypatch=monkeypatch)
    wanted = [
        torch.rand(3, generator=torch.Generator().manual_seed(derive_seed(0, "step", step))) for step in range(12)
    ]
    torch.testing.assert_close(torch.stack(drawn), torch.stack(wanted), rtol=0, atol=0)


# --- length and resolution ---


def test_early_stopping_ends_a_run_that_no_longer_gets_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["train.epochs=14", "data.validation=0.3", "schedule.name=cosine"]
    whole = run(tmp_path / "a", *settings, dataset=make_dataset(noise=0.5), monkeypatch=monkeypatch).train_log()
    folder = run(
        tmp_path / "b", *settings, "train.early_stopping=3", dataset=make_dataset(noise=0.5), monkeypatch=monkeypatch
    )
    log = folder.train_log()
    assert log["status"] == "finished" and log["stopped_early"] and folder.test_log() is not None
    assert 3 < len(log["epochs"]) == log["best_epoch"] + 3 < 14
    for entry, same in zip(log["epochs"], whole["epochs"], strict=False):
        assert {**entry, "seconds": 0} == {**same, "seconds": 0}
    assert not whole["stopped_early"]


def test_a_run_that_ends_anyway_is_not_called_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch is the best one, so patience ends with the last one."""
    accuracies = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr(
        "cifarlab.train._validate", lambda network, *_: (1.0, next(accuracies)) if network else (None,) * 2
    )
    settings = ["train.epochs=3", "train.early_stopping=2", "evaluate.test=false"]
    log = run(tmp_path, *settings, monkeypatch=monkeypatch).train_log()
    assert (len(log["epochs"]), log["best_epoch"], log["stopped_early"]) == (3, 1, False)


@pytest.mark.parametrize(("count", "size", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (3, 1, [1] * 3)])
def test_a_last_image_joins_the_batch_before(count: int, size: int, sizes: list[int]) -> None:
    parts = in_batches(torch.arange(count), size)
    assert [len(part) for part in parts] == sizes and torch.cat(parts).tolist() == list(range(count))


def test_resolution_grows_at_the_shares_that_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = recipe(
        "model.name=timm:test_efficientnet",
        "train.resolution=[[0, 16], [0.3, 24], [0.8, 32]]",
        "augment.crop_padding=4",
    )
    task = build.make_task(plan, prepare(make_dataset(), plan.data, 0), CPU, None, lambda _: None)
    batches = make_batches(plan, task, 0, BySteps(10))
    sides = [next(batches).inputs.shape[2:] for _ in range(12)]
    assert sides == [(16, 16)] * 3 + [(24, 24)] * 5 + [(32, 32)] * 4
    assert task.pipeline.output_size == (32, 32)
    later = make_batches(plan, task, 8, BySteps(10))  # going on at step 8
    ninth = next(itertools.islice(make_batches(plan, task, 0, BySteps(10)), 8, None))
    torch.testing.assert_close(next(later).inputs, ninth.inputs, atol=0, rtol=0)


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 0.7), (0.4, 0.7)])
def test_each_step_mixes_its_own_batch(alphas: tuple[float, float]) -> None:
    plain = recipe("train.batch_size=60")
    mixup, cutmix = alphas
    mixing = recipe("train.batch_size=60", f"loss.mixup={mixup}", f"loss.cutmix={cutmix}")
    task = build.make_task(plain, prepare(make_dataset(), plain.data, 0), CPU, None, lambda _: None)
    batches = zip(make_batches(plain, task, 0, BySteps(5)), make_batches(mixing, task, 0, BySteps(5)), strict=False)
    for step, (plain_batch, batch) in enumerate(itertools.islice(batches, 5)):
        mixed = mix(plain_batch.inputs, plain_batch.labels, mixup=mixup, cutmix=cutmix, seed=0, step=step)
        torch.testing.assert_close(batch.inputs, mixed.pixels, rtol=0, atol=0)
        assert batch.partners is not None and batch.share is not None
        assert torch.equal(batch.labels, plain_batch.labels)
        assert torch.equal(batch.partners, mixed.partners) and torch.equal(batch.share, mixed.share)


# --- the head that stays ---


def test_a_kept_head_learns_on_all_its_outputs_and_is_scored_on_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["model={name: 'timm:test_efficientnet', head: keep}", "train.epochs=1", "train.batch_size=200"]
    folder = run(tmp_path, *settings, "loss.class_weights=balanced", monkeypatch=monkeypatch)
    plan, dataset, log = folder.recipe(), make_dataset(), folder.train_log()
    data = prepare(dataset, plan.data, 0)
    model = build_model(plan.model, classes=4, size=(32, 32), seed=0)
    order = data.train.index
    logits = model.train()(normalised(dataset.train.pixels[order], data))
    assert logits.shape == (180, 1000)
    loss = F.cross_entropy(logits, torch.from_numpy(dataset.train.labels[order])).item()
    assert log["epochs"][0]["train_loss"] == pytest.approx(loss, rel=1e-4)
    assert np.load(folder.path / "predictions.npz")["logits"].shape == (50, 4)
