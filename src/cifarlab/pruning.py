"""InfoBatch: epochs without some of the images that the network has learned already, those that stay counting for them.

Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning" (arXiv 2303.04947).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cifarlab import distributed, machine
from cifarlab.recipe_sections import Prune
from cifarlab.seeds import derive_seed


class Pruned(NamedTuple):
    """batches: of one epoch, sample indices int64 (B,). weights: float32 (N,), by sample. Both on the CPU."""

    batches: tuple[Tensor, ...]
    weights: Tensor


class Pruning:
    """What each image's loss was when it was last trained on, and which images an epoch leaves out for it.

    An image whose last loss is below the mean of all last losses is left out with the probability `section.share`, r;
    one that stays has the weight 1 / (1 - r), all others 1. So the weighted sum of gradients is in expectation that of
    all images. images: N, how many there are in the store.
    """

    def __init__(self, section: Prune, seed: int, images: int, device: torch.device) -> None:
        self._section, self._seed = section, seed
        self._losses = torch.full((images,), torch.nan, device=device)
        # Which of them are of this process, and not known to others yet.
        self._fresh = torch.zeros(images, dtype=torch.bool, device=device)
        self._weights: Tensor | None = None  # of the epoch; 0 for what is left out
        self._epoch = -1
        self._restored = False

    def epoch(self, order: Tensor, epoch: int, *, steps: int, share: float) -> Pruned | None:
        """The images of an epoch in as many batches as without, which are smaller instead; None: all of them, as ever.

        order: the epoch's samples, int64 (K,), on the CPU. share: of the run that is over. An image whose loss is not
        known yet stays. None where no loss is known, from `section.until` on, and where less than two images were left
        for some step. The draw is a function of seed and epoch. Waits for the device.
        """
        if self._restored and epoch == self._epoch:  # decided by the losses that there were when it began
            self._restored = False
            if self._weights is None:
                return None
            return Pruned(torch.tensor_split(order[self._weights[order] > 0], steps), self._weights)
        self._weights, self._epoch = None, epoch
        if share >= self._section.until:
            return None
        self._share()
        losses = self._losses[machine.upload(order, self._losses.device)]
        easy = (losses < losses.nanmean()).cpu()  # false where either is NaN
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "prune", epoch))
        stays = ~easy | (torch.rand(len(order), generator=generator) >= self._section.share)
        kept = order[stays]
        if not easy.any() or len(kept) < 2 * steps:
            return None
        self._weights = weights = torch.ones(len(self._losses))
        weights[order[easy]] = 1 / (1 - self._section.share)
        weights[order[~stays]] = 0
        return Pruned(torch.tensor_split(kept, steps), weights)

    @torch.no_grad()
    def record(self, samples: Tensor, logits: Tensor, labels: Tensor, label_smoothing: float) -> None:
        """Keep the losses of a batch: logits (B, K) of the images at `samples` (int64 (B,), on the CPU)."""
        losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        places = machine.upload(samples, self._losses.device)
        self._losses[places] = losses.to(self._losses.dtype)
        self._fresh[places] = True

    def _share(self) -> None:
        """Have the losses that the other processes have recorded; to be called in each."""
        if distributed.place().size == 1:
            return
        recorded = self._fresh.to(self._losses.dtype)
        losses = torch.where(self._fresh, self._losses, 0)
        distributed.sum_in_place([losses, recorded])
        self._losses = torch.where(recorded > 0, losses / recorded, self._losses)
        self._fresh.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in the middle of an epoch too: all losses, and the weights that the epoch has. To be
        called in each process."""
        self._share()
        return {"losses": self._losses, "weights": self._weights, "epoch": self._epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`: the epoch that it was made in keeps its weights."""
        self._losses.copy_(state["losses"])
        self._weights, self._epoch, self._restored = state["weights"], state["epoch"], True
