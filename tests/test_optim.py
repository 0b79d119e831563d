"""Optimizers against PyTorch's, timm's and the paper; determinism; and how a schedule reaches the groups."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from timm.optim.lion import Lion as TimmsLion
from torch import Tensor, nn

from cifarlab.errors import RecipeError
from cifarlab.optim import Lion, build_optimizer, set_learning_rate
from cifarlab.recipe_optimizer import (
    AdamOptimizer,
    AdamWOptimizer,
    LionOptimizer,
    Optimizer,
    RMSpropOptimizer,
    SGDOptimizer,
)
from cifarlab.recipe_schedule import OneCycleSchedule
from cifarlab.schedule import Values, values

EVERY_OPTIMIZER: list[Optimizer] = [
    SGDOptimizer(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    AdamOptimizer(lr=1e-2, weight_decay=1e-2),
    AdamWOptimizer(lr=1e-2, weight_decay=1e-1),
    RMSpropOptimizer(lr=1e-3, momentum=0.9, weight_decay=1e-3),
    LionOptimizer(lr=1e-3, weight_decay=1e-1),
]
each_optimizer = pytest.mark.parametrize("section", EVERY_OPTIMIZER, ids=lambda section: section.name)


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    # No bias before the norm: its gradient is rounding alone, which Adam would blow up to whole steps.
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, cycle: bool = False) -> None:
    """A few steps on batches that are a function of the step; with `cycle` under a moving rate and momentum."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 3, 8, 8, generator=generator)
        labels = torch.randint(10, (16,), generator=generator)
        if cycle:
            set_learning_rate(
                optimizer,
                values(OneCycleSchedule(), share=step / 10, epoch=0, epochs=1, warmup_share=0, val_losses=()),
            )
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])


# --- against a reference ----------------------------------------------------------------------


def plain_pytorch(section: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """What the section means, in PyTorch's simplest implementation."""
    p, slow = model.parameters(), {"foreach": False, "fused": False}
    match section:
        case SGDOptimizer():
            return torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, **slow)
        case AdamOptimizer():
            return torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **slow)
        case AdamWOptimizer():
            return torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-1, **slow)
        case RMSpropOptimizer():
            return torch.optim.RMSprop(p, lr=1e-3, alpha=0.99, momentum=0.9, weight_decay=1e-3, foreach=False)
        case LionOptimizer():
            return TimmsLion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-1, foreach=False)


@each_optimizer
def test_an_optimizer_takes_the_steps_of_the_reference(section: Optimizer) -> None:
    ours, theirs = a_model(), a_model()
    start = weights(ours)
    train(ours, build_optimizer(section, ours), range(3))
    train(theirs, plain_pytorch(section, theirs), range(3))
    assert (weights(ours) - weights(theirs)).abs().max() < 1e-5
    assert (weights(ours) - start).abs().max() > 1e-3


def test_every_field_reaches_the_optimizer() -> None:
    model = nn.Linear(2, 2)
    cases: list[tuple[Optimizer, list[str]]] = [
        (SGDOptimizer(lr=0.3, momentum=0.7, nesterov=True, weight_decay=0.01), ["momentum", "nesterov"]),
        (AdamOptimizer(lr=0.3, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.01), ["betas", "eps"]),
        (AdamWOptimizer(lr=0.3, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.02), ["betas", "eps"]),
        (RMSpropOptimizer(lr=0.3, alpha=0.9, eps=1e-5, momentum=0.5, weight_decay=0.01), ["alpha", "eps", "momentum"]),
        (LionOptimizer(lr=0.3, betas=(0.8, 0.95), weight_decay=0.01), ["betas"]),
    ]
    for section, fields in cases:
        (group,) = build_optimizer(section, model).param_groups
        for field in [*fields, "lr", "weight_decay"]:
            assert group[field] == getattr(section, field), f"{section.name}.{field}"


def test_weight_decay_is_l2_in_adam_and_decoupled_in_adamw_and_lion() -> None:
    # Without a gradient of its own, L2 makes Adam step by lr, whatever the decay; decoupled decay shrinks the weights.
    cases: list[tuple[Optimizer, float]] = [
        (AdamOptimizer(lr=0.1, weight_decay=0.5), 2.0 - 0.1),
        (AdamWOptimizer(lr=0.1, weight_decay=0.5), 2.0 * (1 - 0.1 * 0.5)),
        (LionOptimizer(lr=0.1, weight_decay=0.5), 2.0 * (1 - 0.1 * 0.5)),
    ]
    for section, want in cases:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        model.weight.grad = torch.zeros_like(model.weight)
        build_optimizer(section, model).step()
        assert model.weight.item() == pytest.approx(want, rel=1e-6), section.name


def test_lion_is_the_papers_algorithm_by_hand() -> None:
    # Algorithm 2 of arXiv 2302.06675 in plain numbers: interpolate, take the sign, decay, and only then the momentum.
    lr, beta1, beta2, decay = 0.1, 0.9, 0.99, 0.2
    weight, momentum = 1.0, 0.0
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Lion([parameter], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    # The third gradient is small against the momentum: the sign of the step is the momentum's, not its own.
    for gradient, sign in [(2.0, 1), (-1.0, -1), (0.05, 1)]:
        update = math.copysign(1.0, beta1 * momentum + (1 - beta1) * gradient)
        assert update == sign
        weight -= lr * (update + decay * weight)
        momentum = beta2 * momentum + (1 - beta2) * gradient
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert parameter.item() == pytest.approx(weight, rel=1e-12)
        assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(momentum, rel=1e-12)


def test_lion_is_timms_over_many_steps() -> None:
    ours, theirs = a_model(), a_model()
    train(ours, Lion(ours.parameters(), lr=1e-3, betas=(0.95, 0.98), weight_decay=0.3), range(20))
    reference = TimmsLion(theirs.parameters(), lr=1e-3, betas=(0.95, 0.98), weight_decay=0.3, foreach=False)
    train(theirs, reference, range(20))
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)


def test_lion_leaves_a_parameter_without_a_gradient_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lion([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(2)
    optimizer.step()
    assert unused.tolist() == [1.0, 1.0]
    assert used.tolist() != [1.0, 1.0]
    assert unused not in optimizer.state


def test_lion_returns_the_loss_of_a_closure() -> None:
    parameter = nn.Parameter(torch.tensor(3.0))
    optimizer = Lion([parameter], lr=0.5)

    def closure() -> float:
        loss = parameter**2
        torch.autograd.backward(loss)
        return float(loss.detach())

    assert optimizer.step(closure) == 9.0
    assert parameter.item() == 2.5


# --- determinism and going on -----------------------------------------------------------------


@each_optimizer
def test_the_same_seed_gives_the_same_bits(section: Optimizer) -> None:
    first, second = a_model(), a_model()
    train(first, build_optimizer(section, first), range(4), cycle=True)
    train(second, build_optimizer(section, second), range(4), cycle=True)
    assert torch.equal(weights(first), weights(second))


@each_optimizer
def test_going_on_from_a_saved_state_gives_the_same_bits_as_never_stopping(section: Optimizer) -> None:
    straight = a_model()
    train(straight, build_optimizer(section, straight), range(6), cycle=True)

    stopped = a_model()
    optimizer = build_optimizer(section, stopped)
    train(stopped, optimizer, range(3), cycle=True)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved: dict[str, Any] = torch.load(file, weights_only=True)

    resumed = a_model()
    optimizer = build_optimizer(section, resumed)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(3, 6), cycle=True)
    assert torch.equal(weights(straight), weights(resumed))


@pytest.mark.parametrize("section", EVERY_OPTIMIZER[:3], ids=lambda section: section.name)
def test_the_fused_step_gives_the_same_bits_with_any_number_of_threads(section: Optimizer) -> None:
    def after_three_steps(threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            # Larger than the share that one thread takes, and no multiple of a vector's width.
            model = nn.ParameterList([torch.randn(70_001), torch.randn(3, 5)])
            optimizer = build_optimizer(section, model)
            for _ in range(3):
                for parameter in model:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
            return torch.cat([parameter.detach().flatten() for parameter in model])
        finally:
            torch.set_num_threads(before)

    assert torch.equal(after_three_steps(1), after_three_steps(2))


# --- groups and the schedule ------------------------------------------------------------------


@each_optimizer
def test_a_schedules_factor_multiplies_the_base_learning_rate_however_often(section: Optimizer) -> None:
    optimizer = build_optimizer(section, a_model())
    for factor in (0.5, 0.1, 1.0):
        set_learning_rate(optimizer, Values(factor, None))
        assert [group["lr"] for group in optimizer.param_groups] == [section.lr * factor]


def test_groups_keep_their_own_base_learning_rates() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "base_lr": 0.4}, {"params": [model.bias], "base_lr": 0.1}], lr=1.0, momentum=0.9
    )
    set_learning_rate(optimizer, Values(0.5, None))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05]


@each_optimizer
def test_the_schedules_momentum_is_the_first_beta_or_the_momentum(section: Optimizer) -> None:
    optimizer = build_optimizer(section, a_model())
    (group,) = optimizer.param_groups
    key = "momentum" if section.name in ("sgd", "rmsprop") else "betas"
    before = group[key]
    set_learning_rate(optimizer, Values(0.5, None))
    assert group[key] == before
    set_learning_rate(optimizer, Values(0.5, 0.77))
    assert group[key] == (0.77 if key == "momentum" else (0.77, before[1]))


def test_frozen_parameters_are_left_out() -> None:
    model = a_model()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = build_optimizer(AdamWOptimizer(lr=1e-3), model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model[1:].parameters()}


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="no trainable parameters"):
        build_optimizer(SGDOptimizer(lr=0.1), nn.Linear(2, 2).requires_grad_(False))


# --- the section ------------------------------------------------------------------------------


def test_an_optimizer_is_told_by_its_name_and_reads_back_from_its_dump() -> None:
    adapter: TypeAdapter[Optimizer] = TypeAdapter(Optimizer)
    for section in EVERY_OPTIMIZER:
        assert adapter.validate_python(section.model_dump(mode="json")) == section


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"name": "adamax", "lr": 1e-3}, "adamw"),
        ({"name": "adam"}, "lr"),
        ({"name": "adam", "lr": 0}, "lr"),
        ({"name": "adam", "lr": True}, "lr"),
        ({"name": "adam", "lr": math.inf}, "lr"),
        ({"name": "adam", "lr": 0.1, "weight_decay": -1e-4}, "weight_decay"),
        ({"name": "adam", "lr": 0.1, "betas": [0.9, 1.0]}, "betas"),
        ({"name": "adam", "lr": 0.1, "betas": [0.9]}, "betas"),
        ({"name": "adam", "lr": 0.1, "momentum": 0.9}, "momentum"),
        ({"name": "sgd", "lr": 0.1, "nesterov": True}, "needs a momentum"),
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": 1}, "nesterov"),
    ],
)
def test_a_wrong_optimizer_is_refused_by_the_field(section: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        TypeAdapter(Optimizer).validate_python(section)
