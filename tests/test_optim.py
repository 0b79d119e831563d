"""Optimizers against PyTorch's, timm's and the paper; determinism; and how a schedule reaches the groups."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.optim._param_groups import param_groups_layer_decay
from timm.optim.lion import Lion as TimmsLion
from torch import Tensor, nn

from cifarlab.errors import RecipeError
from cifarlab.models.chain import freeze, freeze_backbone
from cifarlab.models.small import ex1, ex2
from cifarlab.optim import Lion, build_optimizer, parameter_groups, set_learning_rate
from cifarlab.recipe_optimizer import (
    AdamOptimizer,
    AdamWOptimizer,
    LionOptimizer,
    MuonOptimizer,
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
    MuonOptimizer(lr=1e-3, weight_decay=1e-1),
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
        case MuonOptimizer():
            raise NotImplementedError("Muon has tests of its own")


@pytest.mark.parametrize("section", EVERY_OPTIMIZER[:-1], ids=lambda section: section.name)
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
        (
            MuonOptimizer(lr=0.3, momentum=0.7, nesterov=False, ns_steps=3, betas=(0.8, 0.95), weight_decay=0.01),
            ["momentum", "nesterov", "ns_steps", "betas"],
        ),
    ]
    for section, fields in cases:
        group = build_optimizer(section, model).param_groups[0]
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


def test_lion_takes_each_groups_own_rate_and_decay_by_hand() -> None:
    first, second = (nn.Parameter(torch.tensor([w], dtype=torch.float64)) for w in (1.0, -2.0))
    optimizer = Lion(
        [
            {"params": [first], "lr": 0.1, "base_lr": 0.1, "weight_decay": 0.2},
            {"params": [second], "lr": 0.3, "base_lr": 0.3, "weight_decay": 0.0, "betas": (0.5, 0.6)},
        ],
        lr=1.0,
    )
    first.grad, second.grad = torch.tensor([5.0], dtype=torch.float64), torch.tensor([-4.0], dtype=torch.float64)
    set_learning_rate(optimizer, Values(0.5, None))
    optimizer.step()
    assert first.item() == pytest.approx(1.0 - 0.05 * (1 + 0.2 * 1.0), rel=1e-12)
    assert second.item() == pytest.approx(-2.0 + 0.15, rel=1e-12)
    assert optimizer.state[first]["exp_avg"].item() == pytest.approx(0.01 * 5.0, rel=1e-12)
    assert optimizer.state[second]["exp_avg"].item() == pytest.approx(0.4 * -4.0, rel=1e-12)


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


# --- Muon --------------------------------------------------------------------------------------


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Jordan's iteration in float64, on the smaller side: X <- a X + (b A + c A²) X with A = X Xᵀ, X of norm 1.

    Coefficients: leloykun.github.io/ponder/muon-opt-coeffs, five steps.
    """
    coefficients = [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T, steps).T
    x: Tensor = matrix / matrix.norm()
    for a, b, c in coefficients[:steps]:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def with_a_matrix(shape: tuple[int, ...]) -> tuple[nn.Module, nn.Parameter]:
    """A network whose one matrix or convolution besides the head has this shape; and its parameter."""
    torch.manual_seed(0)
    out, inputs, *kernel = shape
    model = nn.Sequential(nn.Conv2d(inputs, out, kernel[0]) if kernel else nn.Linear(inputs, out), nn.Linear(3, 2))
    return model, model.get_parameter("0.weight")


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 4, 3, 3), (40, 3, 3, 3)], ids=str)
def test_muon_is_its_papers_update_by_hand(shape: tuple[int, ...], nesterov: bool, steps: int) -> None:
    lr, momentum, decay = 0.02, 0.8, 0.3
    section = MuonOptimizer(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=steps, weight_decay=decay)
    model, parameter = with_a_matrix(shape)
    optimizer = build_optimizer(section, model)
    buffer = torch.zeros(shape, dtype=torch.float64)
    for step in range(3):
        before = parameter.detach().double()
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.clone()
        optimizer.step()

        buffer = momentum * buffer + (1 - momentum) * gradient.double()
        update = momentum * buffer + (1 - momentum) * gradient.double() if nesterov else buffer
        matrix = update.flatten(1)
        scale = 0.2 * math.sqrt(max(matrix.shape))  # AdamW's root mean square (arXiv 2502.16982)
        change = -lr * (scale * newton_schulz(matrix, steps).view(shape) + decay * before)
        # timm iterates in bfloat16, of 8 bits: it comes to within 2.5 %. The other kind of momentum, another decay
        # or number of steps would be 10 % to 100 % away.
        error = (parameter.detach().double() - before - change).norm() / change.norm()
        assert error < 0.05, f"step {step}: {error:.3f}"
        if steps == 5:
            # And what the iteration is for: singular vectors as they are, singular values near 1.
            u, _, v = torch.linalg.svd(matrix, full_matrices=False)
            orthogonal = (before * (1 - lr * decay) - parameter.detach().double()).flatten(1) / (lr * scale)
            assert (orthogonal - u @ v).norm() / (u @ v).norm() < 0.1


def matrices(model: nn.Module) -> set[str]:
    """The names of those parameters that Muon makes orthogonal."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(MuonOptimizer(lr=0.1), model)
    assert sorted(names[parameter] for group in groups for parameter in group["params"]) == sorted(names.values())
    return {names[parameter] for group in groups if group["use_muon"] for parameter in group["params"]}


def test_muon_takes_matrices_and_convolutions_but_not_the_head() -> None:
    assert matrices(ex1(10, 32)) == {"conv1.weight", "conv2.weight", "conv3.weight", "conv4.weight"}
    assert matrices(ex2(10, 32)) == {"conv1.weight", "conv2.weight", "conv3.weight", "hidden.weight"}


def test_muon_leaves_to_adamw_what_is_no_map_from_all_inputs_to_all_outputs() -> None:
    class Oddities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(49, 4))
            self.layer_scale = nn.Parameter(torch.zeros(8, 1, 1))
            self.to_one = nn.Conv2d(8, 1, 3)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.depthwise_wider = nn.Conv2d(8, 16, 3, groups=8)
            self.grouped = nn.Conv2d(8, 8, 3, groups=2)
            self.attention = nn.MultiheadAttention(8, 2)
            self.pointwise = nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 3)

    assert matrices(Oddities()) == {"attention.in_proj_weight", "attention.out_proj.weight", "pointwise.weight"}

    lite0 = timm.create_model("tf_efficientnet_lite0")
    found = matrices(lite0)
    assert {"conv_stem.weight", "blocks.2.0.conv_pw.weight", "conv_head.weight"} <= found
    assert not {name for name in found if "conv_dw" in name or "bn" in name or "classifier" in name}
    vit = matrices(timm.create_model("vit_tiny_patch16_224", depth=1))
    layers = ["patch_embed.proj", *(f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))]
    assert vit == {f"{name}.weight" for name in layers}


def test_muons_rest_is_pytorchs_adamw() -> None:
    section = MuonOptimizer(lr=1e-2, betas=(0.8, 0.97), rest_lr_factor=0.3, weight_decay=0.1, nesterov=True)
    ours, theirs = a_model(), a_model()
    optimizer = build_optimizer(section, ours)
    (group,) = [group for group in optimizer.param_groups if not group["use_muon"]]
    assert len(group["params"]) == 4
    assert (group["base_lr"], group["eps"]) == (pytest.approx(3e-3), 1e-8)
    # The convolution never moves, so that both see the same gradients.
    ours[0].weight.requires_grad_(False)
    theirs[0].weight.requires_grad_(False)
    reference = torch.optim.AdamW(theirs[1:].parameters(), lr=3e-3, betas=(0.8, 0.97), weight_decay=0.1, foreach=False)
    start = weights(ours)
    train(ours, optimizer, range(5))
    train(theirs, reference, range(5))
    assert (weights(ours) - weights(theirs)).abs().max() < 1e-6
    assert (weights(ours) - start).abs().max() > 1e-3


def test_muon_leaves_parameters_without_a_gradient_alone() -> None:
    model = a_model()
    optimizer = build_optimizer(MuonOptimizer(lr=0.1, weight_decay=0.5), model)
    before = weights(model)
    optimizer.step()
    assert torch.equal(weights(model), before)
    assert not optimizer.state


def test_a_schedule_moves_muons_rates_and_the_momentum_of_each_kind() -> None:
    optimizer = build_optimizer(MuonOptimizer(lr=0.1, rest_lr_factor=0.5), a_model())
    set_learning_rate(optimizer, Values(0.5, 0.77))
    muon, rest = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["betas"]) == (0.05, 0.77, (0.9, 0.95))
    assert (rest["lr"], rest["betas"], rest["nesterov"]) == (0.025, (0.77, 0.95), False)


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
        assert {group["lr"] for group in optimizer.param_groups} == {section.lr * factor}


def test_groups_keep_their_own_base_learning_rates() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "base_lr": 0.4}, {"params": [model.bias], "base_lr": 0.1}], lr=1.0, momentum=0.9
    )
    set_learning_rate(optimizer, Values(0.5, None))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05]


@pytest.mark.parametrize("section", EVERY_OPTIMIZER[:-1], ids=lambda section: section.name)
def test_the_schedules_momentum_is_the_first_beta_or_the_momentum(section: Optimizer) -> None:
    optimizer = build_optimizer(section, a_model())
    (group,) = optimizer.param_groups
    key = "momentum" if section.name in ("sgd", "rmsprop") else "betas"
    before = group[key]
    set_learning_rate(optimizer, Values(0.5, None))
    assert group[key] == before
    set_learning_rate(optimizer, Values(0.5, 0.77))
    assert group[key] == (0.77 if key == "momentum" else (0.77, before[1]))


def rates(section: Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter by its name; each is in one group, and groups differ."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(section, model)
    found = {names[p]: (group["base_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert len({(group["base_lr"], group["weight_decay"]) for group in groups}) == len(groups)
    assert all(group["lr"] == group["base_lr"] for group in groups)
    return found


@pytest.mark.parametrize("section", EVERY_OPTIMIZER[:-1], ids=lambda section: section.name)
def test_without_further_fields_there_is_one_group_in_the_models_order(section: Optimizer) -> None:
    model = ex1(10, 32)
    (group,) = parameter_groups(section, model)
    assert all(ours is theirs for ours, theirs in zip(group["params"], model.parameters(), strict=True))
    assert group["lr"] == group["base_lr"] == section.lr
    assert group["weight_decay"] == section.weight_decay
    assert set(group) == {"params", "lr", "base_lr", "weight_decay"}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnext_atto", "tf_efficientnet_lite0", "resnet18", "xcit_nano_12_p16_224"]
)
def test_layer_decay_is_timms(name: str) -> None:
    model = timm.create_model(name)
    section = AdamWOptimizer(lr=0.5, layer_decay=0.7, weight_decay=0.1, decay_norms_and_biases=False)
    ours = rates(section, model)
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    reference = param_groups_layer_decay(model, weight_decay=0.1, no_weight_decay_list=spared, layer_decay=0.7)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert ours == {
        names[parameter]: (0.5 * group["lr_scale"], group["weight_decay"])
        for group in reference
        for parameter in group["params"]
    }
    assert len({lr for lr, _ in ours.values()}) > 9
    assert max(lr for lr, _ in ours.values()) == 0.5


def test_layer_decay_of_our_own_network_by_hand() -> None:
    found = rates(SGDOptimizer(lr=0.1, layer_decay=0.5, weight_decay=0.3), ex2(10, 32))
    factors = {"conv1": 1 / 16, "bn1": 1 / 16, "conv2": 1 / 8, "conv3": 1 / 4, "hidden": 1 / 2, "head": 1}
    for layer, factor in factors.items():
        assert found[f"{layer}.weight"] == found[f"{layer}.bias"] == (0.1 * factor, 0.3)


def test_layer_decay_needs_known_layers() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    with pytest.raises(RecipeError, match=r"optimizer.layer_decay .* Unknown"):
        parameter_groups(SGDOptimizer(lr=0.1, layer_decay=0.5), Unknown())
    assert rates(SGDOptimizer(lr=0.1, head_lr=0.5), Unknown())["head.bias"] == (0.5, 0.0)


def test_the_heads_rate_is_its_own() -> None:
    found = rates(AdamWOptimizer(lr=0.1, head_lr=0.03), ex1(10, 32))
    assert found == {name: (0.03 if name.startswith("head.") else 0.1, 0.01) for name in found}
    found = rates(AdamWOptimizer(lr=0.1, head_lr=0.03, layer_decay=0.5), ex1(10, 32))
    assert [found[f"{layer}.bias"][0] for layer in ("conv3", "conv4", "head")] == [0.025, 0.05, 0.03]
    # Also for Muon, whose head is AdamW's: the factor is for rates that follow from `lr`.
    found = rates(MuonOptimizer(lr=0.1, head_lr=0.03, rest_lr_factor=0.5), ex1(10, 32))
    assert [found[name][0] for name in ("conv1.weight", "conv1.bias", "head.weight")] == [0.1, 0.05, 0.03]


def test_norms_and_biases_can_go_without_decay() -> None:
    section = AdamWOptimizer(lr=0.1, weight_decay=0.2, decay_norms_and_biases=False)
    model = ex2(10, 32)
    found = rates(section, model)
    assert {name for name, (_, decay) in found.items() if decay == 0.2} == {
        f"{layer}.weight" for layer in ("conv1", "conv2", "conv3", "hidden", "head")
    }
    assert {decay for _, decay in found.values()} == {0.2, 0.0}
    # Groups come in the order in which the model has the first of their parameters.
    assert [group["weight_decay"] for group in parameter_groups(section, model)] == [0.2, 0.0]
    # timm's own list: positions and tokens; only where it is asked for.
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert rates(section, vit)["pos_embed"] == rates(section, vit)["cls_token"] == (0.1, 0.0)
    assert rates(AdamWOptimizer(lr=0.1, weight_decay=0.2), vit)["pos_embed"] == (0.1, 0.2)


def test_what_is_frozen_for_a_while_is_in_the_groups_and_trains_afterwards() -> None:
    torch.manual_seed(0)
    model = ex1(10, 16)
    freeze(model, 1)
    optimizer = build_optimizer(MuonOptimizer(lr=0.01, weight_decay=0.1), model)
    freeze_backbone(model, 1, frozen=True)

    def moved() -> set[str]:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(model(torch.randn(4, 3, 16, 16)).square().mean())
        optimizer.step()
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    assert moved() == {"head.weight", "head.bias"}
    freeze_backbone(model, 1, frozen=False)
    assert moved() == {name for name, _ in model.named_parameters() if not name.startswith(("conv1.", "bn1."))}


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
