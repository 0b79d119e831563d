"""Optimizers from a recipe, their parameter groups, and how a schedule's values reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from cifarlab.errors import RecipeError
from cifarlab.recipe_optimizer import (
    AdamOptimizer,
    AdamWOptimizer,
    LionOptimizer,
    Optimizer,
    RMSpropOptimizer,
    SGDOptimizer,
)
from cifarlab.schedule import Values


def parameter_groups(section: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in groups, each with its own `base_lr` and `weight_decay`.

    The one place that says which parameter gets which learning rate and weight decay. Raises RecipeError where the
    model has nothing to train.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise RecipeError("the model has no trainable parameters: let the recipe leave some unfrozen")
    return [{"params": parameters, "lr": section.lr, "base_lr": section.lr, "weight_decay": section.weight_decay}]


def build_optimizer(section: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe for a model that is already on its device."""
    groups = parameter_groups(section, model)
    # The fused step is 2 to 5 times as fast as the others, on the CPU too (17M parameters, one thread:
    # AdamW 8 ms against 41, SGD 5 ms against 14), and gives the same bits with any number of threads.
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    match section:
        case SGDOptimizer():
            return torch.optim.SGD(
                groups, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov, fused=fused
            )
        case AdamOptimizer():
            return torch.optim.Adam(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=fused)
        case AdamWOptimizer():
            return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=fused)
        case RMSpropOptimizer():
            return torch.optim.RMSprop(
                groups, lr=section.lr, alpha=section.alpha, eps=section.eps, momentum=section.momentum
            )
        case LionOptimizer():
            return Lion(groups, lr=section.lr, betas=section.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, values: Values) -> None:
    """Give every group its `base_lr` times the schedule's factor, and the momentum where the schedule moves it.

    Momentum is the first of `betas` for optimizers that have them, as in PyTorch's `OneCycleLR`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * values.lr
        if values.momentum is not None:
            if "betas" in group:
                group["betas"] = (values.momentum, *group["betas"][1:])
            else:
                group["momentum"] = values.momentum


class Lion(torch.optim.Optimizer):
    """Lion, algorithm 2 of arXiv 2302.06675, with decoupled weight decay:

    u = sign(b1 × m + (1 - b1) × g);  w = w - lr × (u + weight_decay × w);  m = b2 × m + (1 - b2) × g
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if "exp_avg" not in self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["exp_avg"] for weight in weights]
            beta1, beta2 = group["betas"]

            updates = torch._foreach_lerp(gradients, momenta, beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
        return loss
