"""What the hardware can do, and what each setting of `machine.prepare` is worth on it. Needs no dataset."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cifarlab import machine, numerics
from cifarlab.bench.contenders import Job
from cifarlab.bench.measure import Pair, measure
from cifarlab.errors import RunError
from cifarlab.recipe import Recipe, load_recipe
from cifarlab.recipe_sections import NumericsChoice

# Each figure is the median of calls that take about so many seconds together, and each round of a step takes so many.
SECONDS, SECONDS_A_ROUND = 0.5, 0.6
# The side of the square matrices that are multiplied.
SIDE = 2048
# Copied at once, in bytes, to be more than any cache holds; less where memory is short.
COPIED = 2**29


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution with stride 1 that keeps the number of channels and the size of its images."""

    channels: int
    side: int
    batch_size: int
    depthwise: bool = False

    def __str__(self) -> str:
        kind = "depthwise 3x3" if self.depthwise else "3x3 convolution"
        return f"{kind}, {self.channels} channels, {self.side}x{self.side}, batch {self.batch_size}"

    def tensors(self, device: torch.device | str, **kind: Any) -> tuple[Tensor, Tensor]:
        """Images and a weight, both with gradients. kind: torch's `dtype` and `memory_format`."""
        sizes = (
            (self.batch_size, self.channels, self.side, self.side),
            (self.channels, 1 if self.depthwise else self.channels, 3, 3),
        )
        images, weight = (torch.randn(size, device=device).to(**kind).requires_grad_() for size in sizes)
        return images, weight

    def forward(self, images: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(images, weight, padding=1, groups=self.channels if self.depthwise else 1)

    @property
    def flops(self) -> int:
        """Of forward and backward: each of the two gradients takes as many as the forward."""
        # Counted there, as torch's own count of the gradients takes no notice of groups.
        with FlopCounterMode(display=False) as counter:
            self.forward(*self.tensors("meta"))
        return 3 * int(counter.get_total_flops())


# Images as large as EX-2's, and those of the first and the last layers of networks that race.
DENSE = (Convolution(32, 128, 32), Convolution(64, 32, 128), Convolution(256, 7, 512))
DEPTHWISE = Convolution(144, 32, 128, depthwise=True)
# The steps on which settings are measured, with their batch sizes: activations of EX-2 are large, those of EX-1 small.
# A batch of 32 takes a quarter of the time of EX-2's own 128, at which memory counts for more yet.
STEPS = {"ex2": 32, "ex1": 128}

# Why a setting of `machine.prepare` did not take effect.
_NO_EFFECT = {
    "memory_kept": "only glibc on Linux can be told",
    "huge_pages": "they need memory kept, and a kernel that doesn't count addresses as memory",
    "threads_pinned": "it is for Linux, and for where no OMP_ or KMP_ variable has a say in it",
    "waits_bounded": "it is for Linux, and for where OMP_WAIT_POLICY and GOMP_SPINCOUNT don't say it",
    "denormals_flushed": "this CPU can't",
}


@dataclass(frozen=True)
class Speed:
    """How fast one thing is done in one kind of numbers. flops: of a call, two for each multiplication and addition.

    seconds: of a call; None where it can't be measured, and left_out says why.
    """

    what: str
    numbers: str
    flops: int
    seconds: float | None = None
    left_out: str | None = None

    @property
    def rate(self) -> float | None:
        """FLOP/s."""
        return None if self.seconds is None else self.flops / self.seconds

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "flops_per_second": self.rate}


def ways(device: torch.device) -> dict[str, NumericsChoice]:
    """The kinds of numbers that a device may compute in, by their short names, and how each is asked for."""
    choices = {"fp32": NumericsChoice()}
    if device.type == "cuda":
        choices |= {"tf32": NumericsChoice(tf32=True), "fp16": NumericsChoice(dtype="float16")}
    if device.type != "mps":
        choices["bf16"] = NumericsChoice(dtype="bfloat16")
    return {name: _at_its_best(choice, device) for name, choice in choices.items()}


def _at_its_best(choice: NumericsChoice, device: torch.device) -> NumericsChoice:
    """A choice's numbers in the way that suits convolutions."""
    best = {"channels_last": device.type != "mps", "benchmark": device.type == "cuda", "compile": False}
    return choice.model_copy(update=best)


def speeds(device: torch.device, progress: Callable[[str], None]) -> Iterator[Speed]:
    """Square products and 3x3 convolutions, forward and backward, in each kind of numbers. Sets torch's switches."""
    for numbers, choice in ways(device).items():
        progress(f"{SIDE}x{SIDE} product, {numbers}")
        yield _product(device, numbers, choice)
        for convolution in (*DENSE, DEPTHWISE):
            progress(f"{convolution}, {numbers}")
            yield _convolution(device, numbers, choice, convolution)


def convolution_ceiling(device: torch.device, choice: NumericsChoice) -> float:
    """FLOP/s that dense 3x3 convolutions reach in a choice's numbers, forward and backward: the most of a few shapes.

    What a training step reaches can be set beside it. The layout is the device's best, not the choice's. Sets torch's
    process-wide switches. Raises RunError where nothing could be measured.
    """
    choice = _at_its_best(choice, device)
    found = [_convolution(device, str(choice), choice, convolution) for convolution in DENSE]
    rates = [speed.rate for speed in found if speed.rate is not None]
    if not rates:
        raise RunError(f"no convolution could be measured on {device} in {choice}: {found[0].left_out}")
    return max(rates)


def _product(device: torch.device, numbers: str, choice: NumericsChoice) -> Speed:
    def make() -> Callable[[], object]:
        one, other = torch.randn(2, SIDE, SIDE, device=device).to(getattr(torch, choice.dtype))
        return lambda: torch.mm(one, other)

    return _speed(Speed(f"{SIDE}x{SIDE} product", numbers, 2 * SIDE**3), device, choice, make)


def _convolution(device: torch.device, numbers: str, choice: NumericsChoice, convolution: Convolution) -> Speed:
    def make() -> Callable[[], object]:
        layout = torch.channels_last if choice.channels_last else torch.contiguous_format
        tensors = convolution.tensors(device, dtype=getattr(torch, choice.dtype), memory_format=layout)
        gradient = torch.randn_like(tensors[0])
        return lambda: torch.autograd.grad(convolution.forward(*tensors), tensors, gradient)

    return _speed(Speed(str(convolution), numbers, convolution.flops), device, choice, make)


def _speed(
    speed: Speed, device: torch.device, choice: NumericsChoice, make: Callable[[], Callable[[], object]]
) -> Speed:
    """A speed with the seconds that a call takes of what `make` makes, or with why it has none."""
    if (reason := numerics.impossible(device, choice)) is not None:
        return replace(speed, left_out=reason)
    numerics.chosen(device, choice)
    try:
        return replace(speed, seconds=_seconds(make(), device))
    except RuntimeError as error:  # memory ran out, or the device doesn't know the operation
        return replace(speed, left_out=" ".join(str(error).split())[:200])


def _seconds(call: Callable[[], object], device: torch.device, together: float | None = None) -> float:
    """Median seconds of a call, warm, of calls that take `together` seconds, or else SECONDS."""
    # This import looks for CUDA, and misses it aloud on machines without.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    def clock() -> float:
        machine.synchronize(device)
        return time.perf_counter()

    timer = Timer("call()", globals={"call": call}, timer=clock, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=together or SECONDS).median


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy within the device's memory reads and writes, together."""
    size = min(COPIED, machine.free_memory(device) // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def cost_of_denormals() -> float | None:
    """How many times as long the CPU multiplies denormal numbers as ordinary ones; None where it can't flush them.

    Leaves them flushed, as `machine.prepare` does.
    """
    cpu = torch.device("cpu")
    # Few enough for torch to stay in this thread: the switch is of one thread.
    target = torch.empty(2**14)

    def seconds(value: float) -> float:
        source = torch.full_like(target, value)
        return _seconds(lambda: torch.mul(source, 0.5, out=target), cpu, SECONDS / 10)

    if not torch.set_flush_denormal(False):
        return None
    try:
        return statistics.median(seconds(1e-39) / seconds(1.0) for _ in range(9))  # in turns, as others use the CPU too
    finally:
        torch.set_flush_denormal(True)


def step_recipe(name: str, device: torch.device) -> Recipe:
    """EX-1 or EX-2 as a step of it is measured, on the digits that come with scikit-learn.

    EX-1 is as it ships, fp32. EX-2 is in bf16 where that is fast, as `auto` would have it: then memory counts most.
    """
    recipe = load_recipe(name, ["data.validation=0"]).resolved(dataset="digits", seed=0)
    recipe = recipe.with_train(batch_size=STEPS[name])
    choice = ways(device).get("bf16")
    if name == "ex2" and choice is not None and numerics.impossible(device, choice) is None:
        recipe = recipe.with_train(numerics=choice)
    return recipe


def worth(recipe: Recipe, device: torch.device, rounds: int, progress: Callable[[str], None]) -> dict[str, Pair]:
    """Images per second of a training step with all settings beside the same without one, by the setting's name.

    The batch is always the same. Settings that this process could not have are not measured: neither could others.
    """
    job = Job(recipe.to_yaml(), None, str(device), recipe.train.batch, SECONDS_A_ROUND)
    took_effect = machine.prepare()
    named = {f"ceiling without {name}": name for name in machine.SETTINGS if took_effect[name]}
    pairs = {name: Pair(name, failed=f"not in effect; {why}") for name, why in _NO_EFFECT.items()}
    if named:
        measured = measure(list(named), job, rounds, lambda text: progress(f"{recipe.name}: {text}"), beside="ceiling")
        pairs |= {named[pair.contender]: pair for pair in measured}
    return pairs


def record(recipe: Recipe, pairs: dict[str, Pair]) -> dict[str, Any]:
    """What `worth` found, JSON-ready."""
    return {
        "recipe": recipe.to_dict(),
        "settings": [
            {
                "setting": name,
                "with_all": pair.ours,
                "without_it": pair.theirs,
                "ratio": pair.ratio,
                "left_out": pair.failed,
            }
            for name, pair in pairs.items()
        ],
    }
