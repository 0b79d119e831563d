"""3x3 convolutions of small maps: torch's own beside products of frequencies (`numerics.fourier`).

    python benchmarks/convolutions.py [--images 500] [--rounds 9] [--dtype bfloat16]

Forward and backward of one convolution on this CPU, channels last, both ways in turns; medians, and the share of the
time. `suits` is the rule by which a network's convolutions go by way of frequencies. Half a minute.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

from cifarlab import machine

# Side of the map, channels in, channels out.
LAYERS = (
    *((2, 256, 256), (3, 64, 64), (3, 256, 256), (4, 128, 256), (5, 128, 256)),
    *((7, 32, 256), (7, 96, 96), (7, 128, 128), (7, 256, 256), (9, 32, 128), (9, 128, 128), (15, 32, 128)),
)


def times(side: int, inputs: int, outputs: int, images: int, rounds: int, dtype: str) -> dict[str, float]:
    """Seconds of a forward and backward, by their medians."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from cifarlab import convolutions

    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype)).to(memory_format=torch.channels_last)

    batch = values(images, inputs, side, side).requires_grad_()
    weight = (values(outputs, inputs, 3, 3) / math.sqrt(9 * inputs)).requires_grad_()
    upstream = values(images, outputs, side, side)

    def direct() -> None:
        torch.autograd.grad(F.conv2d(batch, weight, padding=1), (batch, weight), upstream)

    def frequencies() -> None:
        convolutions.FOURIER_SHARE = math.inf  # the rule is what this is to show
        with convolutions.ConvolutionMode(depthwise=False, fourier=True):
            direct()

    ways: dict[str, Callable[[], None]] = {"direct": direct, "frequencies": frequencies}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number >= 2:  # the first make what is kept
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arguments = parser.parse_args()
    machine.prepare()  # before torch is there
    import torch

    from cifarlab.convolutions import products, suits

    print(f"{arguments.dtype}, {arguments.images} images, {torch.get_num_threads()} threads")
    print("| map | channels | products | direct | by frequencies | share | suits |")
    print("|---|---|---:|---:|---:|---:|---|")
    rules = [suits(torch.Size([1, one, side, side]), torch.Size([other, one, 3, 3])) for side, one, other in LAYERS]
    for (side, inputs, outputs), rule in zip(LAYERS, rules, strict=True):
        found = times(side, inputs, outputs, arguments.images, arguments.rounds, arguments.dtype)
        direct, other = found["direct"], found["frequencies"]
        print(
            f"| {side}x{side} | {inputs} to {outputs} | {products(side, side)} of {9 * side * side} | "
            f"{direct * 1000:.1f} ms | {other * 1000:.1f} ms | {other / direct:.2f} | {'yes' if rule else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
