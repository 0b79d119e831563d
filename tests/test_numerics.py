"""Numerics: exact ones are exact, and the choice goes to the fastest way whose first step agrees with fp32's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifarlab import numerics, remembered
from cifarlab.errors import RecipeError, RunError
from cifarlab.experiment import check_plans, run_experiment
from cifarlab.models import build_model
from cifarlab.numerics import Step
from cifarlab.recipe import load_recipe
from cifarlab.recipe_sections import Model, NumericsChoice
from cifarlab.rundir import RunFolder
from cifarlab.train import StopRequest
from short_runs import SMALL, Quiet, make_dataset, run, without_times

CPU = torch.device("cpu")
FP32, LAST, GRAPHS, BF16, BF16_FIRST = (
    NumericsChoice(),
    NumericsChoice(channels_last=True),
    NumericsChoice(channels_last=True, graphs=True),
    NumericsChoice(dtype="bfloat16", channels_last=True),
    NumericsChoice(dtype="bfloat16"),
)


def test_exact_is_fp32_deterministic_and_in_the_layout_that_the_network_prefers_on_a_cpu() -> None:
    torch.use_deterministic_algorithms(False)
    for preference, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        chosen = numerics.exact(CPU, channels_last_on_cpu=preference)
        assert chosen == numerics.Numerics("exact", torch.float32, layout, compiled=False, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32


def test_layout_does_not_change_what_is_computed() -> None:
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = build_model(Model(name="ex2"), classes=10, size=(32, 32), seed=0).to(memory_format=layout)
        loss = F.cross_entropy(model(images.contiguous(memory_format=layout)), labels)
        torch.autograd.backward(loss)
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# --- the choice, with steps that take the time that a test gives them ------------------------------


def plain(way: NumericsChoice) -> NumericsChoice:
    """Without what is tried later, beside the best so far."""
    return NumericsChoice(dtype=way.dtype, channels_last=way.channels_last, tf32=way.tf32)


class Machine:
    """A clock, and steps that move it. `ways`: seconds a step, and what else differs from a faultless step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ways: dict[NumericsChoice, dict[str, Any]]) -> None:
        self.now = 0.0
        self.ways = ways
        self.steps = dict.fromkeys(ways, 0)
        monkeypatch.setattr("cifarlab.numerics.time.perf_counter", lambda: self.now)
        monkeypatch.setattr(numerics, "candidates", lambda _: [w for w in ways if w == plain(w)])
        can = any(way.compile for way in ways)
        monkeypatch.setattr(numerics, "can_compile", lambda _: can)

    def make_step(self, choice: NumericsChoice) -> Step:
        way = self.ways[choice]
        if "error" in way:
            raise way["error"]

        def run() -> Tensor:
            extra = {0: "setup", 1: "capture"}.get(self.steps[choice], "")
            self.steps[choice] += 1
            self.now += way["seconds"] + way.get(extra, 0.0)
            return torch.tensor(way.get("loss", 2.0))

        return Step(run, lambda: [torch.tensor(way.get("gradient", [1.0, 0.0])), torch.tensor([2.0])])

    def choose(
        self, steps: int = 1000, compilations: int = 1, device: torch.device = CPU, **more: bool
    ) -> tuple[NumericsChoice, list[numerics.Trial]]:
        return numerics.measure(device, self.make_step, steps=steps, compilations=compilations, **more)


def test_the_fastest_way_is_chosen_and_the_table_says_what_each_took(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {FP32: {"seconds": 0.3}, LAST: {"seconds": 0.2}, BF16: {"seconds": 0.25}})
    choice, trials = machine.choose()
    assert choice == LAST
    assert [trial.choice for trial in trials] == [FP32, LAST, BF16]
    assert [trial.seconds for trial in trials] == pytest.approx([0.3, 0.2, 0.25])
    assert not any(trial.refused for trial in trials)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"loss": 2.05}, "its loss is 2.0500, fp32's 2.0000"),
        ({"loss": float("nan")}, "its loss is nan"),
        ({"gradient": [-1.0, 2.0]}, "the cosine of their angle is 0."),
        ({"gradient": [1.0, 2.6]}, "the cosine of their angle is 0.65"),
        ({"gradient": [float("nan"), 0.0]}, "the cosine of their angle is nan"),
        ({"error": RuntimeError("not\nimplemented")}, "not implemented"),
    ],
)
def test_a_way_that_fails_or_disagrees_with_fp32_is_refused_however_fast(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], said: str
) -> None:
    machine = Machine(monkeypatch, {FP32: {"seconds": 0.3}, BF16: {"seconds": 0.1, **fault}})
    choice, trials = machine.choose()
    assert choice == FP32
    assert said in str(trials[1].refused)
    assert machine.steps[BF16] <= 1  # and no time is spent on it


def test_rounding_is_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = {"seconds": 0.1, "loss": 2.03, "gradient": [1.0, 1.9]}
    machine = Machine(monkeypatch, {FP32: {"seconds": 0.3}, BF16: rounded})
    assert machine.choose()[0] == BF16


def test_a_hopeless_way_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {FP32: {"seconds": 0.3}, BF16: {"seconds": 7.5}, LAST: {"seconds": 0.2}})
    assert machine.choose()[0] == LAST
    assert machine.steps[BF16] == 2
    assert machine.steps[LAST] == 1 + numerics.ROUNDS


@pytest.mark.parametrize(
    ("steps", "compilations", "compiled"),
    [
        (10_000, 1, True),  # 2,000 s against 1,000 + 60
        (10_000, 3, True),
        (10_000, 30, False),  # one compilation for each resolution
        (500, 1, False),  # 100 s: not even tried
    ],
)
def test_compilation_must_pay_for_itself(
    monkeypatch: pytest.MonkeyPatch, steps: int, compilations: int, compiled: bool
) -> None:
    way = FP32.model_copy(update={"compile": True})
    machine = Machine(monkeypatch, {FP32: {"seconds": 0.2}, way: {"seconds": 0.1, "setup": 60.0}})
    choice, _ = machine.choose(steps=steps, compilations=compilations)
    assert choice.compile == compiled
    if steps == 500:
        assert machine.steps[way] == 0


def test_batches_of_many_sizes_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [FP32.model_copy(update={"compile": compile}) for compile in (True, "frozen")]
    machine = Machine(monkeypatch, {FP32: {"seconds": 0.2}, **{way: {"seconds": 0.1, "setup": 1.0} for way in ways}})
    choice, _ = machine.choose(steps=10_000, frozen=True, one_size=False)
    assert not choice.compile and not any(machine.steps[way] for way in ways)


@pytest.mark.parametrize(("seconds", "compiled"), [(0.194, False), (0.18, True)])
def test_what_has_to_be_prepared_must_be_faster_by_more_than_a_measurement_may_err(
    monkeypatch: pytest.MonkeyPatch, seconds: float, compiled: bool
) -> None:
    way = FP32.model_copy(update={"compile": True})
    machine = Machine(monkeypatch, {FP32: {"seconds": 0.2}, way: {"seconds": seconds, "setup": 3.0}})
    assert machine.choose(steps=10_000)[0].compile == compiled


@pytest.mark.parametrize(("seconds", "tried"), [(0.29, True), (0.31, False)])
def test_compiling_is_tried_in_fp32_too_unless_that_is_far_behind(
    monkeypatch: pytest.MonkeyPatch, seconds: float, tried: bool
) -> None:
    compiled = [way.model_copy(update={"compile": True}) for way in (BF16, LAST)]
    ways = {FP32: {"seconds": seconds}, BF16: {"seconds": 0.2}, **{way: {"seconds": 0.3} for way in compiled}}
    _, trials = Machine(monkeypatch, ways).choose(steps=10_000)
    assert [trial.choice for trial in trials[2:]] == compiled[: 1 + tried]


def test_candidates_without_hardware_for_bf16_are_fp32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarlab.machine.has_fast_bf16", lambda: False)
    assert numerics.candidates(CPU) == [FP32, LAST]
    monkeypatch.setattr("cifarlab.machine.has_fast_bf16", lambda: True)
    assert {way.dtype for way in numerics.candidates(CPU)} == {"float32", "bfloat16"}
    assert numerics.candidates(torch.device("mps")) == [FP32]


# --- depthwise convolutions in bf16, and compiled frozen stages ----------------------------------------


FROZEN_STAGES = [
    "model={name: timm:test_efficientnet, freeze_stages: 2}",
    *("augment={flip: random}", "train.epochs=1", "evaluate.test=false"),
]


def test_frozen_stages_alone_are_compiled_where_the_choice_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[torch.nn.Module] = []
    batches: list[int] = []

    def compile_(module: torch.nn.Module, **_: Any) -> Callable[[Tensor], Tensor]:
        found.append(module)

        def compiled(pixels: Tensor) -> Tensor:
            norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
            assert not torch.is_grad_enabled() and norms and not any(norm.training for norm in norms)
            batches.append(len(pixels))
            output: Tensor = module(pixels)
            return output

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    eager = run(tmp_path / "eager", *FROZEN_STAGES, "train.numerics={channels_last: true}", monkeypatch=monkeypatch)
    assert not found
    settings = "train.numerics={channels_last: true, compile: frozen}"
    compiled = run(tmp_path / "compiled", *FROZEN_STAGES, settings, monkeypatch=monkeypatch)
    (front,) = found
    assert not any(parameter.requires_grad for parameter in front.parameters())
    state = compiled.load_checkpoint("best.pth")["model"]
    frozen = [name for name in state if name.startswith(("conv_stem", "bn1", "blocks.0"))]
    assert len(front.state_dict()) == len(frozen)
    assert set(batches) == {32} and len(batches) == 5  # of 180 images: the last 20 run as they are
    assert_same_bits(eager, compiled)


@pytest.mark.parametrize(("steps", "frozen", "tried"), [(1000, True, True), (1000, False, False), (100, True, False)])
def test_compiled_frozen_stages_are_tried_where_there_are_some_and_they_may_pay(
    monkeypatch: pytest.MonkeyPatch, steps: int, frozen: bool, tried: bool
) -> None:
    way = BF16.model_copy(update={"compile": "frozen"})
    ways = {FP32: {"seconds": 0.3}, BF16: {"seconds": 0.2}, way: {"seconds": 0.15, "setup": 8.0}}
    machine = Machine(monkeypatch, ways)
    choice, trials = machine.choose(steps=steps, frozen=frozen)
    assert choice == (way if tried else BF16)
    assert len(trials) == 2 + tried
    if tried:
        assert "frozen stages compiled" in str(trials[2]) and "8 s until it ran" in str(trials[2])


@pytest.mark.parametrize(
    ("device", "steps", "chosen", "tried"),
    [
        ("cuda", 20_000, True, True),  # 400 s against 200 + 19
        ("cuda", 15_000, False, True),  # 300 s against 294 + 19
        ("cuda", 2_000, False, False),  # 40 s: not even tried
        ("cpu", 20_000, False, False),
    ],
)
def test_cudnns_own_benchmark_is_tried_on_long_runs_on_a_gpu_and_must_pay_for_itself(
    monkeypatch: pytest.MonkeyPatch, device: str, steps: int, chosen: bool, tried: bool
) -> None:
    monkeypatch.setattr("cifarlab.machine.synchronize", lambda _: None)
    way = LAST.model_copy(update={"benchmark": True})
    gain = 0.01 if steps == 20_000 else 0.0004
    ways: dict[NumericsChoice, dict[str, Any]] = {FP32: {"seconds": 0.03}, LAST: {"seconds": 0.02}}
    ways[way] = {"seconds": 0.02 - gain, "setup": 19.0}
    ways[GRAPHS] = {"error": RuntimeError("a step of it can't be captured")}
    choice, trials = Machine(monkeypatch, ways).choose(steps=steps, device=torch.device(device))
    assert choice == (way if chosen else LAST)
    graphs = [GRAPHS] if device == "cuda" else []
    assert [trial.choice for trial in trials] == [FP32, LAST, *graphs, *([way] if tried else [])]
    if tried:
        assert "benchmarked: " in str(trials[3]) and "19 s until it ran" in str(trials[3])


@pytest.mark.parametrize(("seconds", "faster"), [(0.008, True), (0.03, False)])
def test_cuda_graphs_are_tried_on_a_gpu_once_captured_and_what_is_tried_after_them_has_them_too(
    monkeypatch: pytest.MonkeyPatch, seconds: float, faster: bool
) -> None:
    monkeypatch.setattr("cifarlab.machine.synchronize", lambda _: None)
    best = GRAPHS if faster else LAST
    benchmarked = best.model_copy(update={"benchmark": True})
    ways = {FP32: {"seconds": 0.03}, LAST: {"seconds": 0.02}, GRAPHS: {"seconds": seconds, "capture": 5.0}}
    ways[benchmarked] = {"seconds": 0.002, "setup": 19.0}
    choice, trials = Machine(monkeypatch, ways).choose(steps=100, device=torch.device("cuda"))
    assert choice == best and [trial.choice for trial in trials] == [FP32, LAST, GRAPHS]
    assert str(trials[2]) == f"float32, channels last, eager, as CUDA graphs: {seconds * 1000:,.0f} ms a step"
    assert trials[2].seconds == pytest.approx(seconds)
    assert Machine(monkeypatch, ways).choose(steps=100_000, device=torch.device("cuda"))[0] == benchmarked


@pytest.mark.parametrize(("seconds", "faster"), [(0.16, True), (0.19, True), (0.21, False)])
def test_products_of_frequencies_are_tried_where_a_network_has_small_maps_and_taken_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: float, faster: bool
) -> None:
    way = BF16.model_copy(update={"fourier": True})
    compiled = BF16.model_copy(update={"compile": True})
    ways = {FP32: {"seconds": 0.4}, BF16: {"seconds": 0.2}, way: {"seconds": seconds}, compiled: {"seconds": 0.3}}
    choice, trials = Machine(monkeypatch, ways).choose(steps=10_000, fourier=True)
    assert choice == (way if faster else BF16)
    assert [trial.choice for trial in trials] == [
        FP32,
        BF16,
        way,
        *([compiled] if seconds > 0.17 else []),
    ]  # compiled without them
    assert "small maps by frequencies" in str(trials[2])
    choice, trials = Machine(monkeypatch, ways).choose(steps=10_000)
    assert choice == BF16 and way not in [trial.choice for trial in trials]


def test_they_do_not_go_with_compilation() -> None:
    with pytest.raises(
        RecipeError, match=r"train\.numerics: fourier and compile don't go together; leave one of them out"
    ):
        load_recipe("ex1", ["train.numerics={fourier: true, compile: true}"])


@pytest.mark.parametrize("benchmark", [True, False])
def test_the_choice_alone_decides_whether_cudnn_benchmarks(benchmark: bool) -> None:
    assert NumericsChoice().benchmark is False
    try:
        numerics.chosen(torch.device("cuda"), NumericsChoice(benchmark=benchmark))
        assert torch.backends.cudnn.benchmark is benchmark
    finally:
        numerics.exact(CPU, channels_last_on_cpu=False)
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize(
    ("device", "choice", "reason"),
    [
        ("mps", LAST, "BatchNorm"),
        ("cpu", NumericsChoice(benchmark=True), "CUDA"),
        ("cpu", NumericsChoice(tf32=True), "CUDA"),
        ("mps", NumericsChoice(tf32=True), "CUDA"),
        ("cpu", NumericsChoice(graphs=True), "graphs is for CUDA devices"),
        ("cuda", NumericsChoice(fourier=True), "CPUs"),
        ("cpu", BF16, "emulates bfloat16"),
        ("cpu", NumericsChoice(dtype="float16"), "float16 is slower"),
        ("mps", NumericsChoice(compile=True), "no compiler"),
    ],
)
def test_a_device_says_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, device: str, choice: NumericsChoice, reason: str
) -> None:
    monkeypatch.setattr("cifarlab.machine.has_fast_bf16", lambda: False)
    assert reason in str(numerics.impossible(torch.device(device), choice))
    assert numerics.impossible(torch.device(device), FP32) is None
    assert numerics.impossible(CPU, LAST) is None


def test_what_the_device_cannot_do_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    plan = load_recipe("ex1", ["train.numerics={dtype: float16}"]).resolved(dataset="folder:/not/there", seed=0)
    with pytest.raises(RecipeError, match=r"train\.numerics \(float16, channels first, eager\): float16 is slower"):
        check_plans([plan], tmp_path, CPU, lambda _: None)


def test_a_measurement_that_failed_is_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = numerics.Trial(FP32, refused="memory ran out")
    monkeypatch.setattr(numerics, "measure", lambda *_, **__: (FP32, [failed]))
    folder = run(tmp_path, "train.numerics=auto", "train.epochs=1", monkeypatch=monkeypatch)
    assert folder.recipe().train.numerics == FP32
    assert not remembered._path().exists()


def test_nothing_to_compile_is_said_and_not_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    plan = load_recipe("ex1", [*SMALL, "train.numerics={compile: frozen}", "train.epochs=1", "evaluate.test=false"])
    folder = run_experiment(
        plan.resolved(dataset="digits", seed=0),
        make_dataset(),
        runs=tmp_path,
        device=CPU,
        display=Quiet(),
        stop=StopRequest(),
        process_started=0.0,
        report=said.append,
    )
    assert any("there is nothing to compile in 'ex1'" in sentence for sentence in said)
    assert folder.environment()["numerics"]["compiled"] is False


def test_a_compiler_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compile_(module: torch.nn.Module, **_: Any) -> Callable[[Tensor], Tensor]:
        def compiled(pixels: Tensor) -> Tensor:
            raise torch._dynamo.exc.BackendCompilerFailed(compile_, RuntimeError("Python.h: no such file"), None)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(RunError, match=r"torch\.compile failed here.*Python\.h.*train\.numerics\.compile=false"):
        run(tmp_path, "train.numerics={compile: true}", monkeypatch=monkeypatch)


# --- remembered, and in a run ----------------------------------------------------------------------


def test_what_was_measured_is_remembered_by_all_of_its_key_and_a_damaged_memory_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "measured.json"
    monkeypatch.setattr(remembered, "_path", lambda: path)
    assert remembered.recall({"model": "ex1", "batch": 1}) is None
    remembered.remember({"model": "ex1", "batch": 1}, {"dtype": "bfloat16"})
    remembered.remember({"model": "ex1", "batch": 2}, 64)
    assert remembered.recall({"batch": 1, "model": "ex1"}) == {"dtype": "bfloat16"}
    assert remembered.recall({"model": "ex1", "batch": 2}) == 64
    assert remembered.recall({"model": "ex1", "batch": 3}) is None
    for damaged in ("{", "[]", "3"):
        path.write_text(damaged)
        assert remembered.recall({"model": "ex1", "batch": 1}) is None
    remembered.remember({"model": "ex1", "batch": 1}, 5)
    assert remembered.recall({"model": "ex1", "batch": 1}) == 5


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(remembered, "_path", lambda: tmp_path / "measured.json")
    return tmp_path / "measured.json"


Choose = Callable[[NumericsChoice], None]


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Lets the measurement end with a given choice."""

    def decide(choice: NumericsChoice) -> None:
        def measure(device: torch.device, make_step: Any, **_: int) -> tuple[NumericsChoice, list[numerics.Trial]]:
            return choice, [numerics.Trial(choice)]

        monkeypatch.setattr(numerics, "measure", measure)

    return decide


def bits(folder: RunFolder) -> list[Any]:
    return [without_times(folder.train_log()), folder.load_checkpoint("best.pth")["model"]]


def assert_same_bits(one: RunFolder, other: RunFolder) -> None:
    (log, weights), (other_log, other_weights) = bits(one), bits(other)
    assert log == other_log
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name


def test_the_choice_stands_in_the_runs_recipe_which_gives_the_same_bits_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: Path
) -> None:
    first = run(tmp_path / "first", "train.numerics=auto", monkeypatch=monkeypatch)
    choice = first.recipe().train.numerics
    assert isinstance(choice, NumericsChoice)
    tried = first.environment()["numerics"]["tried"]
    assert [trial["numerics"] for trial in tried][:2] == [str(FP32), str(LAST)]
    assert min(tried, key=lambda trial: trial["seconds"] or 1e9)["numerics"] == str(choice)
    assert memory.exists()

    monkeypatch.setattr(numerics, "measure", None)  # the second measures nothing: it is remembered
    second = run(tmp_path / "second", "train.numerics=auto", monkeypatch=monkeypatch)
    assert second.recipe().train.numerics == choice
    assert_same_bits(first, second)


@pytest.mark.parametrize("choice", [BF16, FP32.model_copy(update={"dtype": "float16"})])
def test_lower_precision_trains_scores_and_repeats_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: Path, decided: Choose, choice: NumericsChoice
) -> None:
    decided(choice)
    overrides = ["train.numerics=auto", "train.clip_grad_norm=1.0", "train.epochs=4", "optimizer.lr=3e-3"]
    one = run(tmp_path / "one", *overrides, "train.checkpoint_every={epochs: 2}", monkeypatch=monkeypatch)
    # The rate is constant: shorter runs are the beginning of longer ones.
    short = [*overrides, "evaluate.test=false", "train.checkpoint_every={epochs: 2}"]
    again = run(tmp_path / "again", *short, "train.epochs=2", monkeypatch=monkeypatch)
    halves = [folder.load_checkpoint("epoch-2.pth") for folder in (one, again)]
    for part in ("model", "optimizer", "scaler"):
        torch.testing.assert_close(halves[0][part], halves[1][part], rtol=0, atol=0)
    assert without_times(one.train_log())["epochs"][:2] == without_times(again.train_log())["epochs"]
    exact = run(tmp_path / "exact", *short, "train.epochs=1", "train.numerics=exact", monkeypatch=monkeypatch)
    first, reference = (folder.train_log()["epochs"][0]["train_loss"] for folder in (one, exact))
    assert first != reference
    assert first == pytest.approx(reference, rel=0.02)
    assert one.train_log()["best_val_accuracy"] > 0.9
    assert {value.dtype for value in bits(one)[1].values()} <= {torch.float32, torch.int64}


def test_numerics_may_be_written_field_by_field() -> None:
    assert load_recipe("ex1", ["train.numerics.dtype=bfloat16"]).train.numerics == BF16_FIRST
    assert load_recipe("ex1", ["train.numerics={channels_last: true}"]).train.numerics == LAST
