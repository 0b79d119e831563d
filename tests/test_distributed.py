"""Several processes that train one network: the same batches, sums, results and records as one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from cifarlab import distributed, experiment, flops
from cifarlab.batchnorm import running_statistics
from cifarlab.build import make_task
from cifarlab.data.prepare import prepare
from cifarlab.errors import RecipeError
from cifarlab.feed import TrainingBatch, Whole, deal, make_batches
from cifarlab.models.chain import set_mode
from cifarlab.pace import BySteps
from cifarlab.recipe import load_recipe
from cifarlab.rundir import RunFolder
from cifarlab.training_step import Backward, _seed_of
from processes import (
    a_run,
    batch_norm,
    exchange,
    made_ready,
    normalise,
    rows_and_gradients,
    say_goodbye,
    scored,
    together,
    wait_for_one_that_is_stopped,
)
from short_runs import CPU, make_dataset, recipe, without_pictures, without_times
from test_tricks import small_memory

# No dropout, and all that the processes must agree on.
NETWORK = [
    "model={name: racing, widths: [8, 8, 8]}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "augment={flip: random, translate: 2}",
    "train={epochs: 2, batch_size: 64, numerics: exact, checkpoint_every: {steps: 4}, ema: 0.9}",
]
SETTINGS = {
    "plain": [],
    "mixed": [
        "loss={mixup: 0.4, cutmix: 1.0, class_weights: balanced, label_smoothing: 0.1}",
        "train.accumulate=2",
    ],
    "pruned": ["train.prune={share: 0.5}", "train.epochs=4"],
    "streamed": [
        "data={memory: 1, workers: 0}",
        "optimizer={name: muon, rest: sgd, lr: 0.1, momentum: 0.6, head_lr: 10, bias_lr: 1}",
    ],
    "cached": [
        "model={name: racing, widths: [8, 8, 8], freeze_stages: 2, cache: float32}",
        "augment={flip: random, views: 1}",
        "train.epochs=3",
    ],
}


def settings(name: str) -> list[str]:
    return [*NETWORK, *SETTINGS[name]]


def alone(runs: Path, overrides: list[str], images: int = 430) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "load", None)
        patch.setattr(experiment, "_git_state", None)
        without_pictures(patch)
        patch.setattr(flops, "per_image", None)
        return RunFolder(Path(a_run(runs, overrides, None, images)))


def pictures_of(run: RunFolder) -> list[bytes]:
    """The training images in TensorBoard's one file."""
    (path,) = run.path.glob("events.out.tfevents.*")
    events = EventAccumulator(str(path))
    events.Reload()
    return [event.encoded_image_string for event in events.Images("images/train")]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """The run of one process, with settings of that name."""
    found: dict[str, RunFolder] = {}

    def of(name: str) -> RunFolder:
        if name not in found:
            found[name] = alone(tmp_path_factory.mktemp("one"), settings(name))
        return found[name]

    return of


def check_equal(one: RunFolder, other: RunFolder, tolerance: float = 1e-5) -> None:
    """The same losses, counts and weights but for rounding."""
    logs = [run.train_log() for run in (one, other)]
    assert [e["epoch"] for e in logs[0]["epochs"]] == [e["epoch"] for e in logs[1]["epochs"]]
    for mine, its in zip(logs[0]["epochs"], logs[1]["epochs"], strict=True):
        for name in ("train_loss", "val_loss", "ema_val_loss"):
            assert mine[name] == pytest.approx(its[name], rel=tolerance), name
        assert mine["train_accuracy"] == pytest.approx(its["train_accuracy"], abs=0.005)
        assert mine["lr"] == its["lr"]
    if logs[0]["frozen_stages"] is None:
        assert logs[0]["flops"] == logs[1]["flops"]
    else:  # what is everybody's, as an epoch's last 4 images are, is nobody's to remember: the next batches lack them
        assert logs[0]["flops"] <= logs[1]["flops"] < 1.3 * logs[0]["flops"]
        assert logs[1]["frozen_stages"]["recalled"] > 0
        seen = [log["frozen_stages"]["computed"] + log["frozen_stages"]["recalled"] for log in logs]
        assert seen[0] <= seen[1] < 1.1 * seen[0]
    tests = [run.test_log() for run in (one, other)]
    assert tests[0] is not None
    assert tests[1] is not None
    assert tests[0]["loss"] == pytest.approx(tests[1]["loss"], rel=tolerance)
    assert tests[0]["test_looks"] == tests[1]["test_looks"] == 1
    first, second = (run.checkpoints()[-1] for run in (one, other))
    states = [RunFolder(path.parent).load_checkpoint(path.name) for path in (first, second)]
    assert first.name == second.name
    assert states[0]["images"] == states[1]["images"]
    assert states[0]["sums"]["answers"] == pytest.approx(states[1]["sums"]["answers"], rel=1e-6)
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(value, states[1]["model"][name], rtol=20 * tolerance, atol=20 * tolerance)


# --- what each is to do -----------------------------------------------------------------------


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of several, without the others."""

    def be(rank: int, size: int) -> None:
        monkeypatch.setattr(distributed, "_place", distributed.Place(rank, size, rank))

    return be


@pytest.mark.parametrize("name", ["plain", "mixed", "streamed", "cached"])
@pytest.mark.parametrize("size", [2, 3])
def test_batches_are_those_of_one_process(name: str, size: int, places: Callable[[int, int], None]) -> None:
    """Every image once, its augmentation, partner and share the same, to the last bit."""
    plan = load_recipe("ex1", settings(name)).resolved(dataset="digits", seed=0)
    prepared = prepare(make_dataset(train=400), plan.data, plan.seed)
    task = make_task(plan, prepared, CPU, None, lambda _: None)
    steps = 13

    def batches(rank: int, count: int) -> list[TrainingBatch]:
        places(rank, count)
        own = make_task(plan, prepared, CPU, None, lambda _: None) if task.network.frozen else task
        set_mode(own.network.model, plan.model.freeze_stages, backbone=False)
        return list(itertools.islice(make_batches(plan, own, 0, BySteps(40)), steps))

    wholes = batches(0, 1)
    shares = list(zip(*(batches(rank, size) for rank in range(size)), strict=True))
    for step, (whole, share) in enumerate(zip(wholes, shares, strict=True)):
        epoch, place = divmod(step, 6)
        order = torch.split(experiment_order(plan, task, epoch), 64)[place]
        dealt = []
        for rank in range(size):
            places(rank, size)
            dealt.append(deal(plan, task, order, step))
        assert all(own.whole is not None for own in share)
        assert {own.images for own in share} == {len(whole.labels)}
        assert all(own.rows is not None for own in dealt)
        rows = torch.cat([own.rows for own in dealt if own.rows is not None])
        assert sorted(rows.tolist()) == list(range(len(whole.labels)))
        assert max(len(own.labels) for own in share) - min(len(own.labels) for own in share) <= (
            20 if name == "cached" else len(dealt[0].parts or ())
        )
        for field in ("inputs", "labels", "partners", "share"):
            values = [getattr(own, field) for own in share]
            if values[0] is not None:
                wanted = getattr(whole, field)[rows]
                if name == "cached" and field == "inputs":  # convolutions in other company may round in another way
                    torch.testing.assert_close(torch.cat(values), wanted)
                else:
                    assert torch.equal(torch.cat(values), wanted), (field, step)


def experiment_order(plan: Any, task: Any, epoch: int) -> Tensor:
    from cifarlab.data.batches import epoch_order

    return epoch_order(task.train, plan.seed, epoch)


def test_cached_images_always_come_to_the_same_process(places: Callable[[int, int], None]) -> None:
    plan = load_recipe("ex1", settings("cached")).resolved(dataset="digits", seed=0)
    prepared = prepare(make_dataset(train=400), plan.data, plan.seed)
    places(1, 2)
    task = make_task(plan, prepared, CPU, None, lambda _: None)
    set_mode(task.network.model, 2, backbone=False)
    frozen = task.network.frozen
    assert frozen is not None
    batches = list(itertools.islice(make_batches(plan, task, 0, BySteps(40)), 13))
    owned = int((task.train % 2 == 1).sum())
    assert (frozen.computed, frozen.recalled > owned) == (owned, True)
    assert frozen.record()["bytes"] == owned * batches[0].inputs[0].nbytes  # and has no room for those of others


def test_a_batch_too_small_to_divide_is_everybodys_and_counts_once(places: Callable[[int, int], None]) -> None:
    plan = recipe("train.batch_size=64", "train.accumulate=4")
    prepared = prepare(make_dataset(train=200), plan.data, plan.seed)
    task = make_task(plan, prepared, CPU, None, lambda _: None)
    for rank in (0, 1):
        places(rank, 2)
        few = torch.arange(19)  # parts of 16 and 3, and of 3 somebody would have one
        assert deal(plan, task, few, 0).rows is None
        assert torch.equal(deal(plan, task, few, 0).wanted, few)
        many = deal(plan, task, torch.arange(20), 0)
        assert many.parts == (8, 2)
    places(0, 2)
    with pytest.raises(RecipeError, match="too little for 33 processes"):
        places(0, 33)
        experiment._check_processes(plan)


# --- what is exchanged ------------------------------------------------------------------------


def test_exchanges() -> None:
    for rank, found in enumerate(together(3, exchange)):
        assert found["from first"] == {"rank": 0, "tensor": torch.tensor([0]), "text": "ä\n"}
        assert found["everyones"] == [{"rank": number, "text": "x" * number} for number in range(3)]
        assert found["gathered"].tolist() == [[1, 1], [2, 2], [2, 2]]
        assert found["sums"][0].tolist() == [[3.0] * 3] * 2
        assert found["sums"][1].item() == 4.5
        assert found["copied"][0].tolist() == [[0, 0, 0]] * 2
        assert found["copied"][1].item() == 0
        assert found["error"] == "no such field"
        assert "process 1 on" in found["same"]
        assert "has another recipe than process 0 on" in found["same"]
        assert "lr is 1 instead of 0" in found["same"]
        assert found["alone"] == (1, [rank])
        # A vote is known one call later; only the first one's clock counts; what was asked for twice is done once.
        assert found["votes"] == [
            (None, False), (None, False), (15, False), (None, True), (None, False), (None, False), (None, False),
        ]  # fmt: skip
        losses = nn.functional.cross_entropy(
            torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 1.0]]),
            torch.zeros(4, dtype=torch.int64),
            reduction="none",
        )
        torch.testing.assert_close(found["losses"][:4], losses)
        assert found["losses"][4:].isnan().all()
        # 0, 1 and 2 of 4 were right, and 0 of 4 in the batch that is everybody's; its loss is 1, the other's 2.
        assert found["means"] == pytest.approx(((2 * 12 + 4) / 16, 3 / 16))
        assert found["state"] == found["again"] == {"loss": 28, "weight": 16, "correct": 3, "answers": 16, "images": 16}


def test_processes_begin_alike_and_a_steps_gradients_are_added_up() -> None:
    """Another recipe is refused by all; weights are the first one's; BatchNorm's own statistics are averaged."""
    found = together(3, made_ready)
    for one in found:
        assert "process 2 on" in one["refused"] and "recipe is " in one["refused"]
        assert one["loss"] == 0.25 + 1.25 + 2.25
        assert {*map(tuple, one["gradients"])} == {(6.0,)}
        assert {*map(tuple, one["statistics"])} == {(1.0,)}
        for mine, its in zip(one["begun"], found[0]["begun"], strict=True):
            assert all(torch.equal(value, its[name]) for name, value in mine.items())


def test_dropout_draws_other_numbers_for_other_rows(places: Callable[[int, int], None]) -> None:
    """But the same for a batch that all compute all of."""
    plan, seeds = recipe(), []
    for parts in ((8,), None):
        batch = TrainingBatch(torch.empty(8), torch.empty(8), whole=Whole(16, 16, parts, True))
        for rank in range(3):
            places(rank, 3)
            seeds.append(_seed_of(plan, batch, 5))
    assert len(set(seeds[:3])) == 3
    assert len(set(seeds[3:])) == 1


def test_one_that_runs_out_of_memory_does_not_go_on_by_itself(places: Callable[[int, int], None]) -> None:
    """The others wait for its sums: it would exchange others than they do."""
    plan = recipe("train.batch_size=8")
    task = make_task(plan, prepare(make_dataset(train=60), plan.data, plan.seed), CPU, None, lambda _: None)
    small_memory(task.network.model, 4)
    batch = TrainingBatch(torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64))
    places(1, 2)
    with pytest.raises(torch.OutOfMemoryError):
        Backward(plan, task, None)(batch, 0)


@pytest.mark.parametrize(
    ("dtype", "affine", "mean", "tolerance"),
    [(torch.float32, True, 300.0, 1e-4), (torch.bfloat16, False, 50.0, 0.05)],
)
def test_batch_norm_is_that_of_all_rows(dtype: torch.dtype, affine: bool, mean: float, tolerance: float) -> None:
    rows, upstream = rows_and_gradients(mean)
    layer = batch_norm(affine)
    images = rows.to(dtype).float().requires_grad_()
    output = layer(images)
    torch.autograd.backward(output, upstream)
    layer.eval()
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    found = together(3, normalise, dtype, affine, mean)
    torch.testing.assert_close(torch.cat([one["output"] for one in found]).float(), output.detach(), **close)
    torch.testing.assert_close(torch.cat([one["gradient"] for one in found]).float(), images.grad, **close)
    for number, parameter in enumerate(layer.parameters()):
        torch.testing.assert_close(sum(one["parameters"][number] for one in found), parameter.grad, **close)
    for one in found:
        torch.testing.assert_close(one["evaluated"], layer(rows), **close)
        for mine, its in zip(one["buffers"], layer.buffers(), strict=True):
            torch.testing.assert_close(mine, its, **close)


# --- who lives --------------------------------------------------------------------------------


def watch(rank: int, size: int) -> Any:
    """What watches the others, without them."""
    made: Any = object.__new__(distributed._Watch)
    made._own, made._suspicious = distributed.Place(rank, size, rank), False
    return made


def sign(count: int, **more: Any) -> bytes:
    return json.dumps({"count": count, "host": "h", "pid": 7, **more}).encode()


def test_one_that_tells_nothing_new_for_long_is_gone() -> None:
    """Signs are counted from when they were first seen here: clocks of two machines needn't agree."""
    judge, signs = watch(0, 3)._judge, dict[int, Any]()
    assert judge([sign(1), sign(1), sign(5)], signs, 100.0) is None
    assert judge([sign(1), sign(2), sign(5)], signs, 111.9) is None
    gone = "process 2 of 3 (on h, pid 7) is gone: no sign of life for 12 seconds; what it was at can be gone on with"
    assert judge([sign(1), sign(2), sign(5)], signs, 112.1) == gone
    assert judge([sign(1), sign(2), sign(6)], signs, 112.1) is None
    assert judge([sign(1), sign(2), sign(7)], signs, 123.8) is None  # of itself it knows
    assert "process 1 of 3" in judge([sign(1), sign(2), sign(7)], signs, 124.0)


def test_after_an_exchange_that_failed_silence_says_more() -> None:
    suspicious, signs = watch(1, 2), dict[int, Any]()
    assert suspicious._judge([sign(1), sign(1)], signs, 100.0) is None
    assert suspicious._judge([sign(1), sign(1)], signs, 104.1) is None
    suspicious._suspicious = True
    assert suspicious._judge([sign(1), sign(1)], signs, 103.9) is None
    assert "process 0 of 2 (on h, pid 7) is gone: no sign of life for 4 seconds" in suspicious._judge(
        [sign(1), sign(1)], signs, 104.1
    )


def test_one_that_has_said_why_it_ends_is_quoted_and_one_that_is_done_is_not_missed() -> None:
    judge = watch(0, 3)._judge
    assert judge([sign(1), sign(1, done=True), sign(1, done=True)], {}, 100.0) is None
    signs = {1: distributed._Sign(sign(1, done=True), 0.0)}
    assert judge([sign(1), sign(1, done=True), sign(1)], signs, 100.0) is None
    said = judge([sign(1), sign(1), sign(1, complaint="the disk is full")], {}, 100.0)
    assert said == "process 2 of 3 (on h, pid 7) has ended: the disk is full"


def test_what_waits_for_one_that_is_silent_ends_and_says_so(tmp_path: Path) -> None:
    """Where an exchange does not fail, as NCCL's don't: the run's record has the reason, and the exit code is ours."""
    note = tmp_path / "note"
    with pytest.raises(AssertionError, match="process 0: it ended with 4"):
        together(2, wait_for_one_that_is_stopped, note)
    assert "process 1 of 2" in note.read_text()
    assert "no sign of life for 3 seconds" in note.read_text()


def test_what_all_find_is_said_once() -> None:
    assert together(3, say_goodbye, ["too little", "too little", "the disk is full"]) == [True, False, True]


# --- whole runs -------------------------------------------------------------------------------


# An epoch's last batch has 4 images: two processes divide it, but for cached ones, and three don't.
@pytest.mark.parametrize(
    ("name", "count"), [("plain", 2), ("plain", 3), ("mixed", 2), ("pruned", 2), ("streamed", 2), ("cached", 3)]
)
def test_several_processes_are_as_good_as_one(
    name: str, count: int, tmp_path: Path, one_process: Callable[[str], RunFolder]
) -> None:
    """The same losses within 1e-5, counts and weights, after more than ten steps."""
    one = one_process(name)
    paths = together(count, a_run, tmp_path / "two", settings(name))
    assert len(set(paths)) == 1
    two = RunFolder(Path(paths[0]))
    assert {path.name for path in two.path.iterdir() if "tfevents" not in path.name} == {
        path.name for path in one.path.iterdir() if "tfevents" not in path.name
    }
    assert [entry["device"] for entry in two.environment()["processes"]] == ["cpu"] * count
    (pictures,), (same,) = pictures_of(one), pictures_of(two)
    assert pictures == same
    check_equal(one, two, tolerance=1e-5 if name in ("plain", "cached") else 1e-4)


def test_batch_norm_by_each_process_is_that_of_a_batch_in_parts(tmp_path: Path) -> None:
    """Without `sync_batchnorm`, two processes normalise as one does that computes a batch in two parts."""
    one = alone(tmp_path / "one", [*settings("plain"), "train.accumulate=2", "train.ema=null", "train.epochs=0.8"], 400)
    overrides = [*settings("plain"), "train.sync_batchnorm=false", "train.ema=null", "train.epochs=0.8"]
    two = RunFolder(Path(together(2, a_run, tmp_path / "two", overrides, None, 400)[0]))
    states = [run.load_checkpoint(run.checkpoints()[-1].name)["model"] for run in (one, two)]
    running = 0
    for name, value in states[0].items():
        if "running" in name:  # in parts, one after the other is taken in; here, their mean
            running += 1
            assert not torch.equal(value, states[1][name])
        elif "tracked" not in name:
            torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)
    assert running
    assert one.train_log()["epochs"][0]["train_loss"] == pytest.approx(
        two.train_log()["epochs"][0]["train_loss"], rel=1e-5
    )


def test_statistics_are_averaged_of_layers_in_training() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(3), nn.BatchNorm2d(4, track_running_stats=False))
    model[1].eval()
    assert [len(statistic) for statistic in running_statistics(model)] == [2, 2]


def test_scores_are_those_of_one_process(tmp_path: Path) -> None:
    # The five batches can't be dealt out evenly.
    run = alone(tmp_path, [*settings("plain"), "evaluate={tta: flip, batch_size: 11}"])
    first = run.test_log()
    assert first is not None
    for count in (2, 3):
        several = together(count, scored, str(run.path))
        assert all(without_times(other)["accuracy"] == several[0]["accuracy"] for other in several)
        found = run.test_log()
        assert found is not None
        assert found["confusion_matrix"] == first["confusion_matrix"]
        assert found["tta"]["accuracy"] == first["tta"]["accuracy"]
        assert found["loss"] == pytest.approx(first["loss"], rel=1e-6)
        assert found["test_looks"] == count


# Pruned: the losses of all images, and an epoch's half. Cached: what frozen stages had of images comes to others.
@pytest.mark.parametrize(("name", "before", "after"), [("pruned", 2, 1), ("cached", 1, 3)])
def test_going_on_in_another_number_of_processes(
    name: str, before: int, after: int, tmp_path: Path, one_process: Callable[[str], RunFolder]
) -> None:
    overrides, one = settings(name), one_process(name)
    for count, stop_at in ((before, 7), (after, None)):
        together(count, a_run, tmp_path / "other", overrides, stop_at)
    other = RunFolder(next((tmp_path / "other").rglob("train.json")).parent)
    assert other.environment()["resumed"][0]["from_step"] in (7, 8)
    check_equal(one, other, tolerance=1e-4)
