"""BatchNorm over all processes' rows of a batch, for any network, on any device.

torch's SyncBatchNorm is for GPUs only, and takes the place of modules: timm has its own for its own, and ours are
others again. Here `F.batch_norm`, which all of them call, is computed in another way within a mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cifarlab import distributed


class _Call(NamedTuple):
    """The arguments of F.batch_norm."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class SyncBatchNorm(TorchFunctionMode):
    """Within it, what BatchNorm normalises by in training is of all processes' rows; each must come with at least one.

    Ioffe and Szegedy, arXiv 1502.03167; running statistics too are those of the whole batch.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            call = _Call(*args, **(kwargs or {}))
            if call.training:
                return _normalised(call)
        return func(*args, **(kwargs or {}))


def _normalised(call: _Call) -> Tensor:
    """float of the input's shape, (B, C, …), and dtype."""
    with torch.no_grad():
        input = call.input
        count = input.numel() // input.shape[1]
        # In float64 (which Apple's GPUs haven't got, but nor have they exchanges) nothing is lost by the difference of
        # large numbers below, where means are far from zero.
        mean, var = (statistic.double() for statistic in _mean_and_var(input))
        sums = torch.cat([count * mean, count * (var + mean.square()), mean.new_full((1,), count)])
        distributed.sum_in_place([sums])
        channels = input.shape[1]
        whole = sums[-1]
        mean, squares = sums[:channels] / whole, sums[channels:-1] / whole
        var = (squares - mean.square()).clamp(min=0)
        if call.running_mean is not None and call.running_var is not None:
            call.running_mean.lerp_(mean.to(call.running_mean.dtype), call.momentum)
            call.running_var.lerp_((var * whole / (whole - 1)).to(call.running_var.dtype), call.momentum)
    output: Tensor = _Normalise.apply(input, call.weight, call.bias, mean.float(), var.float(), whole.float(), call.eps)
    return output


def _mean_and_var(input: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of (B, C, …), float32 (C,), without Bessel's correction; by what BatchNorm itself uses, which
    torch.var_mean is 15 times slower than on a CPU."""
    mean, var = torch.batch_norm_update_stats(input, None, None, 0.0)
    return mean, var


class _Normalise(torch.autograd.Function):
    """By a mean and a variance (C,) of `whole` values of each channel, to which the gradient goes through as well."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        whole: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, torch.rsqrt(var + eps), whole)
        ctx.eps = eps
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, scale, whole = ctx.saved_tensors
        # As if the rows here were all: their sums are right, and the gradient of the input lacks the others' sums.
        of_input, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, None, None, mean, scale, True, ctx.eps, [ctx.needs_input_grad[0], True, True]
        )
        if ctx.needs_input_grad[0]:
            own = torch.cat([of_bias, of_weight]).float()
            sums = own.clone()
            distributed.sum_in_place([sums])
            about, along = (own / (input.numel() // input.shape[1]) - sums / whole).chunk(2)
            # What is missing is a line in each channel: factor * (about + along * (input - mean) * scale).
            factor = scale if weight is None else scale * weight.float()
            slope = factor * along * scale
            shape = [1, -1] + [1] * (input.ndim - 2)
            line = torch.addcmul((factor * about - slope * mean).view(shape), input.float(), slope.view(shape))
            of_input += line.to(of_input.dtype)
        return (
            of_input,
            of_weight if weight is not None and ctx.needs_input_grad[1] else None,
            of_bias if ctx.needs_input_grad[2] else None,
            None, None, None, None,
        )  # fmt: skip


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of a model's BatchNorm layers that are in training mode, float32 (C,)."""
    layers = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    found = ([layer.running_mean, layer.running_var] for layer in layers if layer.training)
    return [statistic for pair in found for statistic in pair if statistic is not None]
