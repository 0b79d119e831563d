"""Optimizers from a recipe, their parameter groups, and how a schedule's values reach them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from cifarlab import machine
from cifarlab.errors import RecipeError
from cifarlab.models.chain import head_parameters, layer_ids
from cifarlab.models.racing import whitening_biases
from cifarlab.recipe_optimizer import (
    AdamOptimizer,
    AdamWOptimizer,
    LionOptimizer,
    MuonOptimizer,
    Optimizer,
    RMSpropOptimizer,
    SGDOptimizer,
)
from cifarlab.schedule import Values


def parameter_groups(section: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in groups, each with its own `base_lr` and `weight_decay`.

    The one place that says which parameter gets which learning rate and weight decay. With L the depth of the head and
    i that of a parameter's layer, its learning rate is lr × layer_decay ** (L - i) (BEiT, arXiv 2106.08254); the
    head's is `head_lr` where that is given. Parameters that have both in common are one group; groups and parameters
    are in the order of the model. Muon's groups also say which of its two updates is theirs (`use_muon`).

    Trainable is what requires a gradient now. So what is frozen for good (`chain.freeze`) must be frozen before, and
    what is frozen for a while (`chain.freeze_backbone`) only after this. Raises RecipeError where the model has nothing
    to train, or no known layers for `layer_decay`.
    """
    depths = layer_ids(model) if section.layer_decay < 1 else {}
    deepest = max(depths.values(), default=0)
    head = head_parameters(model) if section.head_lr is not None or isinstance(section, MuonOptimizer) else frozenset()
    spared = set() if section.decay_norms_and_biases else _without_decay(model)
    matrices = _matrices(model, head) if isinstance(section, MuonOptimizer) else set()

    fading = whitening_biases(model)
    groups: dict[tuple[float, float, bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = section.lr * section.layer_decay ** (deepest - depths.get(name, deepest))
        if isinstance(section, MuonOptimizer) and name not in matrices:
            lr *= section.rest_lr_factor
        if section.bias_lr is not None and parameter.ndim <= 1:
            lr = section.bias_lr
        if section.head_lr is not None and name in head:
            lr = section.head_lr
        decay = section.weight_decay
        if isinstance(section, MuonOptimizer) and section.rest == "sgd" and name not in matrices:
            decay = section.rest_decay / lr
        key = (lr, 0.0 if name in spared else decay, name in matrices, name in fading)
        groups.setdefault(key, []).append(parameter)
    if not groups:
        raise RecipeError("the model has no trainable parameters: let the recipe leave some unfrozen")
    return [
        {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": weight_decay}
        | ({"fades": True} if fades else {})
        | (_muon_fields(section, is_matrix) if isinstance(section, MuonOptimizer) else {})
        for (lr, weight_decay, is_matrix, fades), parameters in groups.items()
    ]


def _without_decay(model: nn.Module) -> set[str]:
    """The names of norms' and biases' parameters, and of those that a timm network itself says (its positions)."""
    patterns: Iterable[str] = getattr(model, "no_weight_decay", set)()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _matrices(model: nn.Module, head: Iterable[str]) -> set[str]:
    """The names of the parameters that Muon makes orthogonal: matrices, and convolutions as (out, in × height × width).

    Orthogonal is right for a map from all inputs to all outputs. Not so for the head, whose outputs are classes (as in
    Jordan's Muon); for a grouped convolution, which is many small maps, and in the extreme, depthwise, one filter a
    channel; for one row or column, where it would only fix the length; and for tables of positions and tokens, which
    nothing is multiplied with, and which are the ones whose names don't end in "weight".
    """
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    grouped = {f"{name}.weight" for name, module in convolutions if module.groups > 1}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and min(parameter.shape[:2]) > 1 and name.endswith("weight")
    } - (grouped | set(head))


def _muon_fields(section: MuonOptimizer, is_matrix: bool) -> dict[str, Any]:
    if section.rest == "sgd":
        return {"use_muon": is_matrix, "momentum": section.momentum if is_matrix else section.rest_momentum}
    # With Nesterov's momentum timm would take NAdamW for the rest; its eps is for matrices, not AdamW's.
    return {"use_muon": True} if is_matrix else {"use_muon": False, "nesterov": False, "eps": 1e-8}


def build_optimizer(section: Optimizer, model: nn.Module, *, scaled: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a recipe for a model that is already on its device.

    scaled: whether a GradScaler calls it, which leaves out steps that overflow.
    """
    groups = parameter_groups(section, model)
    # The fused step is 2 to 5 times as fast as the others, on the CPU too (17M parameters, one thread:
    # AdamW 8 ms against 41, SGD 5 ms against 14), and gives the same bits with any number of threads.
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    match section:
        case SGDOptimizer():
            # Where the first step is left out, the fused one goes on from a momentum that was never written.
            fused = fused and not scaled
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
        case MuonOptimizer(rest="sgd"):
            return MuonSGD(groups, lr=section.lr, ns_steps=section.ns_steps, nesterov=section.nesterov)
        case MuonOptimizer():
            from timm.optim.muon import Muon

            muon: torch.optim.Optimizer = Muon(
                groups,
                lr=section.lr,
                momentum=section.momentum,
                nesterov=section.nesterov,
                ns_steps=section.ns_steps,
                adjust_lr_fn="match_rms_adamw",
                betas=section.betas,
            )
            return muon


def set_learning_rate(optimizer: torch.optim.Optimizer, values: Values, fading: float | None = None) -> None:
    """Give every group its `base_lr` times the schedule's factor, and the momentum where the schedule moves it.

    fading: the factor of what trains for a part of the run only (`model.whitening_bias`); None: the schedule's too.

    Momentum is the first of `betas` for optimizers that have them, as in PyTorch's `OneCycleLR`; for Muon's matrices,
    whose groups have both, it is `momentum`.
    """
    for group in optimizer.param_groups:
        factor = fading if group.get("fades") and fading is not None else values.lr
        group["lr"] = group["base_lr"] * factor
        if values.momentum is not None:
            if "betas" in group and not group.get("use_muon"):
                group["betas"] = (values.momentum, *group["betas"][1:])
            else:
                group["momentum"] = values.momentum


class ByGroups(torch.optim.Optimizer):
    """An optimizer that steps a group's parameters together, those that have a gradient.

    A group's `lr` may be a scalar tensor on the device of its parameters: a CUDA graph reads its value in each replay.
    """

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
            if weights:
                self._step_group(group, weights, [weight.grad for weight in weights])
        return loss

    def _step_group(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        raise NotImplementedError

    def _kept(self, name: str, weights: list[Tensor]) -> list[Tensor]:
        """The state of that name of each parameter, zeros at first."""
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return [self.state[weight][name] for weight in weights]


class Lion(ByGroups):
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

    def _step_group(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        momenta = self._kept("exp_avg", weights)
        beta1, beta2 = group["betas"]
        updates = torch._foreach_lerp(gradients, momenta, beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        _move(weights, updates, group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)


class MuonSGD(ByGroups):
    """Muon as in the CIFAR-10 speedruns (airbench94), beside SGD with Nesterov's momentum; a group says which it gets.

    With a matrix W of r rows, a convolution's filters as rows, gradient G and momentum M (`use_muon`):

    M = momentum × M + G;  U = orthogonal(G + momentum × M);  W = √r × W / |W| - lr × U

    U comes from `ns_steps` Newton-Schulz steps (timm's, with Jordan's coefficients), in bf16 where the device has it.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, *, ns_steps: int = 3, nesterov: bool = True
    ) -> None:
        defaults = {"lr": lr, "momentum": 0.0, "weight_decay": 0.0, "use_muon": False}
        super().__init__(params, defaults | {"ns_steps": ns_steps, "nesterov": nesterov})

    def _step_group(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        if not group["use_muon"] and group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        momenta = self._kept("momentum_buffer", weights)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        updates = momenta
        if group["nesterov"]:
            updates = list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))
        if group["use_muon"]:
            updates = [_orthogonal(update, group["ns_steps"]) for update in updates]
            for weight in weights:
                weight.mul_(len(weight) ** 0.5 / weight.norm())
        _move(weights, updates, group["lr"])


def _move(weights: list[Tensor], updates: list[Tensor] | tuple[Tensor, ...], lr: float | Tensor) -> None:
    """weights -= lr × updates"""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(weights, updates, alpha=-lr)


def _orthogonal(update: Tensor, steps: int) -> Tensor:
    """Roughly the nearest to a matrix (r, …) with orthogonal rows or columns: singular values from 0.5 to 1.5."""
    from timm.optim.muon import zeropower_via_newtonschulz

    fast = update.device.type != "cpu" or machine.has_fast_bf16()
    matrix = zeropower_via_newtonschulz(
        update.reshape(len(update), -1),
        steps,
        [(3.4445, -4.7750, 2.0315)],
        dtype=torch.bfloat16 if fast else torch.float32,
    )
    return matrix.to(update.dtype).reshape(update.shape)
