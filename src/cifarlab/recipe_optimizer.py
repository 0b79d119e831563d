"""The `optimizer` section of a recipe: one model an optimizer, told apart by `name`. What they do: `optim.py`.

Defaults are PyTorch's, and the paper's code for Lion; the learning rate has none, as it is each recipe's own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cifarlab.recipe_base import Boolean, Integer, Real, Section

LearningRate = Annotated[Real, Field(gt=0, description="learning rate: the value that the schedule's factors multiply")]
CoupledDecay = Annotated[Real, Field(ge=0, description="weight decay, added to the gradient (L2)")]
DecoupledDecay = Annotated[
    Real, Field(ge=0, description="weight decay, taken off the weights, times the learning rate")
]
Beta = Annotated[Real, Field(ge=0, lt=1)]
Epsilon = Annotated[Real, Field(gt=0, description="added to the denominator")]


class _Groups(Section):
    """Which parameters get which learning rate and weight decay: fields that every optimizer has."""

    layer_decay: Real = Field(
        default=1.0,
        gt=0,
        le=1,
        description="learning rate of a layer over that of the layer after it; the last has `lr`; 1: all have the same",
    )
    head_lr: Real | None = Field(default=None, gt=0, description="learning rate of the last layer; null: `lr`")
    bias_lr: Real | None = Field(default=None, gt=0, description="learning rate of norms and biases; null: `lr`")
    decay_norms_and_biases: Boolean = Field(
        default=True, description="whether weight decay also acts on normalisation layers and biases"
    )


class SGDOptimizer(_Groups):
    """Stochastic gradient descent, with momentum, Nesterov's if asked."""

    name: Literal["sgd"] = Field(default="sgd", description="stochastic gradient descent")
    lr: LearningRate
    momentum: Real = Field(default=0.0, ge=0, lt=1, description="share of the last step that goes into the next")
    nesterov: Boolean = Field(default=False, description="Nesterov's momentum")
    weight_decay: CoupledDecay = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDOptimizer:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0, such as 0.9")
        return self


class AdamOptimizer(_Groups):
    """Adam (arXiv 1412.6980); its weight decay is L2, a part of the gradient."""

    name: Literal["adam"] = Field(default="adam", description="Adam, with L2")
    lr: LearningRate
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="decay of the mean and of the squares")
    eps: Epsilon = 1e-8
    weight_decay: CoupledDecay = 0.0


class AdamWOptimizer(_Groups):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    name: Literal["adamw"] = Field(default="adamw", description="Adam, with decoupled weight decay")
    lr: LearningRate
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="decay of the mean and of the squares")
    eps: Epsilon = 1e-8
    weight_decay: DecoupledDecay = 0.01


class RMSpropOptimizer(_Groups):
    """RMSprop (Hinton's lecture 6e), PyTorch's: eps is added after the square root."""

    name: Literal["rmsprop"] = Field(default="rmsprop", description="RMSprop")
    lr: LearningRate
    alpha: Real = Field(default=0.99, ge=0, lt=1, description="decay of the mean of squares")
    eps: Epsilon = 1e-8
    momentum: Real = Field(default=0.0, ge=0, lt=1, description="share of the last step that goes into the next")
    weight_decay: CoupledDecay = 0.0


class LionOptimizer(_Groups):
    """Lion (arXiv 2302.06675); its learning rate is a third to a tenth of AdamW's, its weight decay as much larger."""

    name: Literal["lion"] = Field(default="lion", description="Lion: the sign of a momentum")
    lr: LearningRate
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.99), description="weight of the momentum in a step; its decay")
    weight_decay: DecoupledDecay = 0.0


class MuonOptimizer(_Groups):
    """Muon (Keller Jordan 2024): the momentum of matrices and convolutions, made orthogonal. AdamW or SGD for the rest.

    With AdamW it is timm's, with the learning rate adjusted to AdamW's scale ("match_rms_adamw", arXiv 2502.16982), so
    that one rate and one decay fit both kinds of parameters. With SGD it is that of the speedruns (airbench94): before
    each step a matrix is brought back to the norm √rows, the step itself is not scaled, and nothing decays it.
    """

    name: Literal["muon"] = Field(default="muon", description="orthogonal momentum for matrices, AdamW for the rest")
    lr: LearningRate
    momentum: Real = Field(default=0.95, ge=0, lt=1, description="share of the last step that goes into the next")
    nesterov: Boolean = Field(default=True, description="Nesterov's momentum")
    ns_steps: Integer = Field(default=5, ge=1, le=20, description="Newton-Schulz iterations a step")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW's, for the rest")
    rest: Literal["adamw", "sgd"] = Field(
        default="adamw", description="what takes care of all but matrices, and of the head"
    )
    rest_lr_factor: Real = Field(
        default=1.0, gt=0, description="its learning rate over `lr`, where bias_lr and head_lr don't say it"
    )
    rest_momentum: Real = Field(default=0.85, ge=0, lt=1, description="Nesterov's momentum of sgd, for the rest")
    weight_decay: DecoupledDecay = 0.0
    rest_decay: Real = Field(
        default=0.0, ge=0, lt=1, description="share of a weight that sgd takes off at each step, at the full rate"
    )

    @model_validator(mode="after")
    def _fields_fit_the_rest(self) -> MuonOptimizer:
        if self.rest == "sgd" and self.weight_decay:
            raise ValueError(
                "weight_decay has no effect with rest 'sgd', which keeps matrices at one norm; set it to 0"
            )
        if self.rest == "adamw" and self.rest_decay:
            raise ValueError("rest_decay is for rest 'sgd'; with adamw it is weight_decay")
        return self


Optimizer = Annotated[
    SGDOptimizer | AdamOptimizer | AdamWOptimizer | RMSpropOptimizer | LionOptimizer | MuonOptimizer,
    Field(discriminator="name"),
]
