"""Exact numerics: layout changes the speed and nothing else, and the same bits are asked for."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cifarlab import numerics
from cifarlab.models import build_model
from cifarlab.recipe_sections import Model

CPU = torch.device("cpu")


def test_exact_is_fp32_deterministic_and_in_the_layout_that_the_network_prefers_on_a_cpu() -> None:
    torch.use_deterministic_algorithms(False)
    for preference, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        chosen = numerics.exact(CPU, channels_last_on_cpu=preference)
        assert chosen == numerics.Numerics("exact", torch.float32, layout, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32


def test_layout_does_not_change_what_is_computed() -> None:
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = build_model(Model(name="ex2"), classes=10, size=(32, 32), seed=0).to(memory_format=layout)
        loss = F.cross_entropy(model(images.contiguous(memory_format=layout)), labels)
        torch.autograd.backward(loss)
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
