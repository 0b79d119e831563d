"""Dtype, layout, compilation: `exact`, or what is fastest here by measurement.

Nothing is right everywhere. bf16 is worth five times where a CPU has AMX and the convolutions are dense, and loses on
depthwise ones; channels last doubles one network and slows another; compilation takes a minute and may not pay for it.
So a few steps of the run's own training are timed in each sensible way, and compared with fp32's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cifarlab import machine
from cifarlab.convolutions import ConvolutionMode
from cifarlab.graphs import WARM_UP
from cifarlab.recipe_sections import NumericsChoice

# How far the first loss may be from fp32's, as a share of it, and how far the direction of the gradient may turn. bf16
# has eight bits; what it came to in a run stands in its environment.json.
LOSS_TOLERANCE = 0.02
# Rounding errors that have nothing to do with a gradient turn it by this much where they are as large as it is. Up to
# there they are less than what other images would have made of it: gradients of two batches are nearly at right angles.
LEAST_COSINE = 0.7
# A way is left out of further rounds once it takes so many times as long as the fastest.
HOPELESS = 2.0
ROUNDS = 5
# What trying to compile may cost is not known before; as a rule up to this many seconds, once for each resolution. What
# has no backward takes a fraction of it.
COMPILATION, FRONT_COMPILATION = 60.0, 10.0
# So many times as long as that must the rest of the run be: compilation gains a fifth where it gains at all, which is
# about half of the time.
WORTH_TRYING = 10
COMPILED_GAIN = 1.2
# Nor does it make up for a dtype that takes so many times as long.
CATCHES_UP = 1.5
# What has to be prepared must be so much faster: a few steps are measured no better than that, and compiled ones have
# been slower in a run than they were here.
WORTH_PREPARING = 1.05
# So many seconds cuDNN took, on an H200, to time its ways of each of a network's convolutions.
BENCHMARK = 20.0


@dataclass(frozen=True)
class Numerics:
    """How a model's arithmetic is done.

    dtype: of convolutions and products, by autocast; weights are float32. memory_format: how images and convolution
    weights lie in memory. compiled: whether training runs a compiled network, or compiled frozen stages before one that
    isn't. deterministic: whether the same bits are promised. benchmark: whether cuDNN times its ways of each
    convolution when it meets it first. graphs: whether training steps are replayed as CUDA graphs. fourier: whether 3x3
    convolutions of small maps are products of frequencies.
    """

    name: str
    dtype: torch.dtype
    memory_format: torch.memory_format
    compiled: bool | Literal["frozen"]
    deterministic: bool
    tf32: bool = False
    benchmark: bool = False
    graphs: bool = False
    fourier: bool = False

    def activate(self, device: torch.device) -> None:
        """Set torch's process-wide switches for it."""
        fast = self.name != "exact" and device.type != "cpu"
        # On the CPU everything that is used here is deterministic. On a GPU the odd operation is not: torch then warns.
        torch.use_deterministic_algorithms(not fast, warn_only=not self.deterministic)
        # A debugging aid of the deterministic mode that writes NaN over all new memory: an eighth of EX-2's step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = self.benchmark
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32

    def evaluating(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """In which a network's forward runs that is to have no backward, or that is compiled."""
        return self._within(device, depthwise=False)

    def training(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """In which a forward runs that is to have a backward, and that is not compiled."""
        return self._within(device, depthwise=device.type == "cpu" and self.dtype == torch.bfloat16)

    def _within(self, device: torch.device, *, depthwise: bool) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        if self.dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype=self.dtype))
        if depthwise or self.fourier:
            stack.enter_context(ConvolutionMode(depthwise=depthwise, fourier=self.fourier))
        return stack


def exact(device: torch.device, *, channels_last_on_cpu: bool) -> Numerics:
    """fp32, eager, deterministic: same seed, machine and thread count, same bits (on the CPU).

    Layout does not change what is computed, only how fast: `channels_last_on_cpu` is the network's own preference.
    Sets torch's process-wide switches.
    """
    channels_last = channels_last_on_cpu and device.type == "cpu"
    return _active(Numerics("exact", torch.float32, _layout(channels_last), False, device.type == "cpu"), device)


def chosen(device: torch.device, choice: NumericsChoice) -> Numerics:
    """A choice that was made: on the CPU it gives the same bits each time, as `exact` does. Sets torch's switches."""
    dtype = getattr(torch, choice.dtype)
    layout = _layout(choice.channels_last)
    deterministic = device.type == "cpu"
    return _active(
        Numerics(
            str(choice),
            dtype,
            layout,
            choice.compile,
            deterministic,
            tf32=choice.tf32,
            benchmark=choice.benchmark,
            graphs=choice.graphs,
            fourier=choice.fourier,
        ),
        device,
    )


def _active(numbers: Numerics, device: torch.device) -> Numerics:
    # cuBLAS is deterministic only with a fixed workspace, and reads this when the first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    numbers.activate(device)
    if numbers.compiled:
        # A network is compiled anew for each resolution; and the next run's is another one.
        torch._dynamo.config.recompile_limit = 64
        # It misses CUDA aloud on machines without.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return numbers


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# --- the choice -------------------------------------------------------------------------------


def candidates(device: torch.device) -> list[NumericsChoice]:
    """What may be the fastest on this device, without compilation. fp32 without anything comes first."""
    plain = NumericsChoice()
    if device.type == "cuda":
        # A T4 emulates bf16 and calls it supported.
        low: Literal["bfloat16", "float16"] = (
            "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        )
        return [
            plain,
            NumericsChoice(tf32=True),
            NumericsChoice(tf32=True, channels_last=True),
            NumericsChoice(dtype=low, tf32=True),
            NumericsChoice(dtype=low, tf32=True, channels_last=True),
        ]
    if device.type == "mps":
        return [plain]  # BatchNorm's gradients are wrong there with channels last (pytorch issue 175189)
    ways = [plain, NumericsChoice(channels_last=True)]
    if machine.has_fast_bf16():
        ways += [NumericsChoice(dtype="bfloat16", channels_last=flag) for flag in (True, False)]
    return ways


def impossible(device: torch.device, choice: NumericsChoice) -> str | None:
    """Why a device can't compute in that way, as a clause; None where it can."""
    if choice.channels_last and device.type == "mps":
        return "PyTorch's gradients of BatchNorm are wrong there with channels last"
    for field in ("tf32", "benchmark", "graphs"):
        if getattr(choice, field) and device.type != "cuda":
            return f"{field} is for CUDA devices"
    if choice.fourier and device.type != "cpu":
        return "fourier is for CPUs"
    if choice.dtype == "bfloat16":
        if device.type == "cpu" and not machine.has_fast_bf16():
            return "this CPU only emulates bfloat16, which can be 25 times slower than float32"
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "this GPU only emulates bfloat16"
    if choice.dtype == "float16" and device.type == "cpu":
        return "float16 is slower than float32 on a CPU"
    if choice.compile and not can_compile(device):
        return "torch.compile finds no compiler for this device"
    return None


class Step(NamedTuple):
    """A training step that can be done again and again.

    gradients: those of the step that was done last. whole: whether it fitted into memory as the recipe divides it.
    """

    run: Callable[[], Tensor]
    gradients: Callable[[], list[Tensor]]
    whole: Callable[[], bool] = lambda: True


@dataclass
class Trial:
    """A way that was tried. seconds: median of a step; setup: until its first step was done. refused: why it is out."""

    choice: NumericsChoice
    seconds: float | None = None
    setup: float = 0.0
    loss: float | None = None
    cosine: float | None = None
    refused: str | None = None

    def __str__(self) -> str:
        result = self.refused or f"{(self.seconds or 0.0) * 1000:,.0f} ms a step"
        setup = f", {self.setup:.0f} s until it ran" if self.prepares and self.refused is None else ""
        return f"{self.choice}: {result}{setup}"

    @property
    def prepares(self) -> bool:
        """Whether its first step is an investment, which the steps that follow have to pay back."""
        return bool(self.choice.compile) or self.choice.benchmark

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "numerics": str(self.choice),
            "seconds": self.seconds,
            "setup": self.setup,
            "loss": _finite(self.loss),
            "gradient_cosine": _finite(self.cosine),
            "refused": self.refused,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def measure(
    device: torch.device,
    make_step: Callable[[NumericsChoice], Step],
    *,
    steps: int,
    compilations: int,
    frozen: bool = False,
    one_size: bool = True,
    fourier: bool = False,
    together: bool = False,
) -> tuple[NumericsChoice, list[Trial]]:
    """Time each way of doing a step, and say which gets `steps` of them done first.

    make_step: a fresh network, optimizer and batch, the same each time. compilations: how many times the step would
    be compiled, once for each resolution. frozen: whether there are stages that don't train, and are computed at each
    step. one_size: whether all batches but the last have one size; else nothing is compiled. fourier: whether there are
    convolutions that may be faster by way of frequencies. together: whether processes will exchange sums within a step,
    which can be neither compiled nor captured. What doesn't agree with the first way, fp32, is refused.
    """
    trials: list[Trial] = []
    running: dict[int, Step] = {}
    reference: list[Tensor] = []

    def begin(choice: NumericsChoice) -> Trial:
        trial = Trial(choice)
        trials.append(trial)
        began = time.perf_counter()
        try:
            step = make_step(choice)
            trial.loss = step.run().item()
            gradient = [value.float().cpu().clone() for value in step.gradients()]
            for _ in range(WARM_UP + 1 if choice.graphs else 0):  # until one was captured, and replayed
                step.run()
        except (RuntimeError, MemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            trial.refused = " ".join(str(error).split())[:200] or type(error).__name__
            return trial
        trial.setup = time.perf_counter() - began
        if not reference:
            reference.extend(gradient)
            if not math.isfinite(trial.loss):
                trial.refused = "its loss is not finite"
                return trial
        trial.cosine = _cosine(reference, gradient)
        trial.refused = _disagreement(trials[0], trial)
        if trial.refused is None:
            running[len(trials) - 1] = step
        return trial

    def time_rounds(numbers: list[int]) -> None:
        times: dict[int, list[float]] = {number: [] for number in numbers}
        for _ in range(ROUNDS):
            for number, taken in times.items():
                fastest = min((min(other) for other in times.values() if other), default=0.0)
                if taken and min(taken) > HOPELESS * fastest:
                    continue
                machine.synchronize(device)
                began = time.perf_counter()
                running[number].run()
                machine.synchronize(device)
                taken.append(time.perf_counter() - began)
        for number, taken in times.items():
            trials[number].seconds = statistics.median(taken)

    for choice in candidates(device):
        begin(choice)
        if trials[0].refused is not None:  # there is nothing to compare with: training will say what is wrong
            return choice, trials
    time_rounds(list(running))

    def cost(number: int) -> float:
        trial = trials[number]
        whole = (trial.seconds or 0.0) * steps
        return whole * WORTH_PREPARING + trial.setup * compilations if trial.prepares else whole

    def invest(choices: list[NumericsChoice]) -> None:
        """Try ways whose first step takes long, beside the best so far."""
        for choice in choices:
            number = len(trials)
            begin(choice)
            if number in running:
                time_rounds([min(set(running) - {number}, key=cost), number])

    def best() -> Trial:
        return trials[min(running, key=cost)]

    def left() -> float:
        return (best().seconds or 0.0) * steps / compilations

    if device.type == "cuda" and not together:
        invest([best().choice.model_copy(update={"graphs": True})])
    if device.type == "cuda" and left() > WORTH_TRYING * BENCHMARK:
        invest([best().choice.model_copy(update={"benchmark": True})])
    direct = best()
    if fourier:
        invest([direct.choice.model_copy(update={"fourier": True})])
    plain, compiled = direct.choice, list[NumericsChoice]()
    # Compilation leaves convolutions as they are: where frequencies save more than it ever does, it isn't tried.
    compilable = one_size and not together and can_compile(device)
    if compilable and (direct.seconds or 0.0) < COMPILED_GAIN * (best().seconds or 0.0):
        if frozen and left() > WORTH_TRYING * FRONT_COMPILATION:
            compiled.append(plain.model_copy(update={"compile": "frozen"}))
        if left() > WORTH_TRYING * COMPILATION:
            limit = CATCHES_UP * (best().seconds or 0.0)
            near = {trials[number].choice.dtype for number in running if (trials[number].seconds or 0.0) <= limit}
            dtypes = dict.fromkeys([plain.dtype, *near & {"float32"}])
            compiled += [plain.model_copy(update={"compile": True, "dtype": dtype}) for dtype in dtypes]
    invest(compiled)
    return best().choice, trials


def _cosine(one: list[Tensor], other: list[Tensor]) -> float:
    """Of the angle between two gradients, each in parts."""
    product = sum((a.double() * b.double()).sum().item() for a, b in zip(one, other, strict=True))
    lengths = [sum(part.double().square().sum().item() for part in parts) ** 0.5 for parts in (one, other)]
    return product / (lengths[0] * lengths[1]) if all(lengths) else 1.0


def _disagreement(reference: Trial, trial: Trial) -> str | None:
    """Why a way's first step can't be trusted, None where it can."""
    assert reference.loss is not None
    assert trial.loss is not None
    assert trial.cosine is not None
    if not abs(trial.loss - reference.loss) <= LOSS_TOLERANCE * abs(reference.loss):
        return f"its loss is {trial.loss:.4f}, fp32's {reference.loss:.4f}"
    if not trial.cosine >= LEAST_COSINE:
        return f"its gradient is not fp32's: the cosine of their angle is {trial.cosine:.3f}"
    return None


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs here: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    if device.type != "cpu":
        return False
    import shutil

    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name)
