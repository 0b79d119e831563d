"""Convolutions on a CPU that oneDNN is slow at, computed in other ways: depthwise ones in bf16, 3x3 ones of small maps.

`ConvolutionMode` puts them in the place of `F.conv2d`, in any network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode

# A convolution goes by way of frequencies where that takes at most this share of its multiplications. They are a little
# dearer there, for what is copied between the products: with this share time is saved, by measurement.
FOURIER_SHARE = 0.6


class _Call(NamedTuple):
    """The arguments of `F.conv2d`, numbers for both directions as pairs."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    places: list[list[int]]  # stride, padding, dilation
    groups: int

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.input.shape[1]

    @property
    def fourier(self) -> bool:
        return self.groups == 1 and self.places == [[1, 1]] * 3 and suits(self.input.shape, self.weight.shape)


def _call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Call | None:
    """None for what is to be left to `F.conv2d`: an image without a batch, padding by a word."""
    if input.ndim != 4 or isinstance(padding, str):
        return None
    pairs = [[value] * 2 if isinstance(value, int) else list(value) for value in (stride, padding, dilation)]
    return _Call(input, weight, bias, pairs, groups)


class ConvolutionMode(TorchFunctionMode):
    """Within it, convolutions on the CPU that suit one of the other ways are computed in that way.

    depthwise: those that are to have a backward, in bf16, by `_Depthwise`. fourier: 3x3 ones of small maps, by
    `_Fourier`.
    """

    def __init__(self, *, depthwise: bool, fourier: bool) -> None:
        super().__init__()
        self._depthwise = depthwise
        self._fourier = fourier

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            call = _call(*args, **(kwargs or {}))
            output = self._other_way(call) if call is not None else None
            if output is not None:
                return output
        return func(*args, **(kwargs or {}))

    def _other_way(self, call: _Call) -> Tensor | None:
        input, weight = call.input, call.weight
        output: Tensor
        if self._depthwise and call.depthwise:
            if not torch.is_grad_enabled() or not (input.requires_grad or weight.requires_grad):
                return None
            output = _Depthwise.apply(input.to(torch.bfloat16), weight, *call.places)
        elif self._fourier and call.fourier:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
            output = _Fourier.apply(input.to(dtype), weight.to(dtype))
        else:
            return None
        return output if call.bias is None else output + call.bias.to(output.dtype).view(1, -1, 1, 1)


# --- depthwise ---------------------------------------------------------------------------------


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution in bf16 whose backward keeps to what CPUs do fast.

    In bf16, oneDNN takes up to 50 times as long for the weight's gradient once a kernel is wider than 3, and for the
    images' gradient once there is a stride. So the first is put together from kernels that are 3 wide, and the second
    computed in fp32. Both are rounded to bf16, as bf16's own are.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.places = stride, padding, dilation
        return F.conv2d(images, weight.to(images.dtype), None, stride, padding, dilation, images.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.places
        channels, plain = images.shape[1], dilation == [1, 1]
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            dtype = images.dtype if plain and stride == [1, 1] else torch.float32
            # Not `torch.nn.grad.conv2d_input`, which doesn't know how the images lie in memory.
            of_images = torch.ops.aten.convolution_backward(
                gradient.to(dtype),
                images.to(dtype),
                weight.to(dtype),
                *(None, stride, padding, dilation, False, [0, 0], channels, [True, False, False]),
            )[0].to(images.dtype)
        if ctx.needs_input_grad[1] and plain and weight.shape[3] > 3:
            of_weight = _gradient_of_wide(images, weight, gradient, stride, padding)
        elif ctx.needs_input_grad[1]:
            dtype = images.dtype if plain else torch.float32
            of_weight = conv2d_weight(  # type: ignore[no-untyped-call]
                images.to(dtype), weight.shape, gradient.to(dtype), stride, padding, dilation, channels
            ).to(weight.dtype)
        return of_images, of_weight, None, None, None


def _gradient_of_wide(
    images: Tensor, weight: Tensor, gradient: Tensor, stride: list[int], padding: list[int]
) -> Tensor:
    """The gradient of a depthwise weight that is more than 3 wide: those of kernels that are 3 wide, side by side."""
    channels, _, height, width = weight.shape
    result = torch.empty_like(weight)
    reach = (gradient.shape[3] - 1) * stride[1] + 3  # so many columns are seen by a kernel that is 3 wide
    for left in (*range(0, width - 3, 3), width - 3):
        before = padding[1] - left
        part = F.pad(images, (before, reach - before - images.shape[3]))  # cut off where that is less than 0
        result[..., left : left + 3] = conv2d_weight(  # type: ignore[no-untyped-call]
            part, (channels, 1, height, 3), gradient, stride, (padding[0], 0), groups=channels
        )
    return result


# --- 3x3 of small maps -------------------------------------------------------------------------


class _Fourier(torch.autograd.Function):
    """A 3x3 convolution, as large as its input, as products of frequencies (Mathieu, Henaff, LeCun, arXiv 1312.5851).

    A map of h x w with a row and a column of zeros is one period of a periodic signal: what wraps around meets zeros.
    So its discrete Fourier transform times that of the kernel is that of the output. The maps are so small that the
    transforms are best done as products with a matrix; and as the sums of Gauss's way to multiply two complex numbers
    with three products are linear too, they are rows of those matrices. What is left between them is a product of
    matrices, (images, inputs) by (inputs, outputs), for each of P rows: 94 for a map of 7x7, where 9 x 49 = 441 are
    taken by the convolution. It is exact but for rounding, and as cosines and sines are no larger than 1, that is
    small: 0.4 % in bf16, where oneDNN's own has 0.2 %.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        count, inputs, height, width = images.shape
        outputs = weight.shape[0]
        of_maps, of_kernels, back = transforms(height, width, images.dtype)
        spectra = _frequencies_first(of_maps @ images.permute(0, 2, 3, 1).reshape(count, height * width, inputs))
        kernels = (of_kernels @ weight.permute(2, 3, 1, 0).reshape(9, inputs * outputs)).view(-1, inputs, outputs)
        ctx.save_for_backward(spectra, kernels)
        ctx.shape = height, width
        return _maps(back @ _frequencies_first(torch.bmm(spectra, kernels)), height, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        spectra, kernels = ctx.saved_tensors
        height, width = ctx.shape
        count, outputs = gradient.shape[:2]
        inputs = kernels.shape[1]
        of_maps, of_kernels, back = transforms(height, width, gradient.dtype)
        of_product = _frequencies_first(back.T @ gradient.permute(0, 2, 3, 1).reshape(count, height * width, outputs))
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_spectra = _frequencies_first(torch.bmm(of_product, kernels.transpose(1, 2)))
            of_images = _maps(of_maps.T @ of_spectra, height, width)
        if ctx.needs_input_grad[1]:
            of_kernel = torch.bmm(spectra.transpose(1, 2), of_product).view(-1, inputs * outputs)
            of_weight = (of_kernels.T @ of_kernel).view(3, 3, inputs, outputs).permute(3, 2, 0, 1)
        return of_images, of_weight


def _frequencies_first(values: Tensor) -> Tensor:
    """(a, b, c) to (b, a, c), copied: products of matrices that don't lie together take twice as long."""
    return values.transpose(0, 1).contiguous()


def _maps(values: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C) to (B, C, height, width), channels last."""
    return values.view(values.shape[0], height, width, -1).permute(0, 3, 1, 2)


def products(height: int, width: int) -> int:
    """Rows of the transforms of a map: one for each real coefficient of its spectrum, three for each complex pair."""
    periods = height + 1, width + 1
    real = math.prod(2 - period % 2 for period in periods)  # in each direction 0, and the half of an even period
    return real + 3 * (math.prod(periods) - real) // 2


def suits(images: torch.Size, weight: torch.Size) -> bool:
    """Whether a convolution of (B, C, H, W) and (O, C, …), all else 1, is to go by way of frequencies."""
    outputs, inputs, *kernel = weight
    height, width = images[2:]
    if kernel != [3, 3] or min(height, width) < 2:
        return False
    rows, places = products(height, width), height * width
    taken = rows * (inputs * outputs + places * (inputs + outputs))
    return taken <= FOURIER_SHARE * 9 * places * inputs * outputs


@functools.lru_cache(maxsize=64)
def transforms(height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of maps (P, height * width), of kernels (P, 9), and back (height * width, P).

    back @ ((of_maps @ map) * (of_kernels @ kernel)) is the convolution of a map with a 3x3 kernel, padding 1.
    """
    periods = height + 1, width + 1

    def angles(frequency: tuple[int, int], rows: range, columns: range) -> Tensor:
        turns = [
            frequency[0] * row / periods[0] + frequency[1] * column / periods[1] for row in rows for column in columns
        ]
        return 2 * math.pi * torch.tensor(turns, dtype=torch.float64)

    of_maps, of_kernels, back = [], [], []
    seen = set[tuple[int, int]]()
    for frequency in itertools.product(range(periods[0]), range(periods[1])):
        mirrored = -frequency[0] % periods[0], -frequency[1] % periods[1]
        if mirrored in seen:  # the complex conjugate of one that is there
            continue
        seen.add(frequency)
        places = angles(frequency, range(height), range(width))
        taps = angles(frequency, range(-1, 2), range(-1, 2))
        # Of a map a + bi, of a kernel c + di (its conjugate: torch's convolution is a correlation).
        a, b, c, d = places.cos(), -places.sin(), taps.cos(), taps.sin()
        if mirrored == frequency:
            of_maps.append(a)
            of_kernels.append(c)
            back.append(a)
            continue
        # Gauss: c(a + b) - b(c + d) is the real part, c(a + b) + a(d - c) the imaginary one.
        of_maps += [a + b, a, b]
        of_kernels += [c, d - c, c + d]
        # Each stands for its conjugate as well.
        back += [2 * (a + b), 2 * b, -2 * a]
    norm = math.prod(periods) ** 0.5
    matrices = torch.stack(of_maps) / norm, torch.stack(of_kernels), torch.stack(back, dim=1) / norm
    one, two, three = (matrix.to(dtype).contiguous() for matrix in matrices)
    return one, two, three


class _Looking(TorchFunctionMode):
    """Notes whether a convolution within it would go by way of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.found: bool = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            call = _call(*args, **(kwargs or {}))
            self.found = self.found or (call is not None and call.fourier)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fourier_suits(model: nn.Module, shape: Sequence[int]) -> bool:
    """Whether any convolution of a network would go by way of frequencies for inputs of that shape, (B, 3, H, W).

    Runs on the meta device: nothing is computed, and the module, its buffers and the random state stay as they are.
    Raises whatever a network raises that can't be run there.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    looking = _Looking()
    with torch.random.fork_rng(devices=[]), looking:
        torch.func.functional_call(model, stand_ins, torch.empty(*shape, device="meta"))
    return looking.found
