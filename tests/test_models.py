"""The report's networks: parameter counts and every output shape, as printed there or worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cifarlab.errors import RecipeError
from cifarlab.models import NETWORKS, build_model, parameter_count
from cifarlab.recipe import Model


def output_shapes(model: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
        for name, layer in model.named_children()
    ]
    model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return shapes


def test_ex1_has_the_reports_parameters_and_shapes() -> None:
    model = build_model(Model(name="ex1"), classes=100, size=(32, 32), seed=0)
    assert parameter_count(model) == 266_416
    expected: dict[str, tuple[int, ...]] = {}
    for number, shape in enumerate([(12, 30, 30), (12, 28, 28), (24, 12, 12), (24, 10, 10)], 1):
        expected |= {f"{layer}{number}": shape for layer in ("conv", "bn", "relu")}
    expected |= {"pool": (12, 14, 14), "flatten": (2400,), "head": (100,)}
    assert output_shapes(model, 32) == expected


def test_ex2_has_the_reports_parameters_and_shapes() -> None:
    model = build_model(Model(name="ex2"), classes=100, size=(128, 128), seed=0)
    assert parameter_count(model) == 16_904_548
    expected: dict[str, tuple[int, ...]] = {}
    for number, (channels, side) in enumerate([(16, 128), (32, 64), (64, 32)], 1):
        expected |= {f"{layer}{number}": (channels, side, side) for layer in ("conv", "bn", "relu")}
        expected[f"pool{number}"] = (channels, side // 2, side // 2)
    expected |= {"flatten": (16_384,), "hidden": (1024,), "relu": (1024,), "head": (100,)}
    assert output_shapes(model, 128) == expected


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_other_sizes_work_down_to_the_smallest_and_are_refused_below(name: str) -> None:
    smallest = NETWORKS[name].minimum_size
    for size in (smallest, smallest + 7, 64):
        model = build_model(Model(name=name), classes=3, size=(size, size), seed=0).eval()
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    for shape in ((smallest - 1, smallest - 1), (64, 32)):
        with pytest.raises(RecipeError, match=f"'{name}' takes square images of at least {smallest} pixels"):
            build_model(Model(name=name), classes=3, size=shape, seed=0)


def test_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(
            build_model(Model(name="ex1"), classes=10, size=(32, 32), seed=seed).parameters()
        )

    first = weights(1)
    torch.rand(10)  # what was drawn in between must not matter
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_an_unknown_network_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown model.name 'ex3'; did you mean 'ex[12]'\?"):
        build_model(Model(name="ex3"), classes=10, size=(32, 32), seed=0)
