"""The sections of a recipe, apart from the optimizer and the schedule, which have modules of their own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from cifarlab.recipe_base import Boolean, Duration, Integer, Real, Section, is_path, shown

MAX_SIDE = 2048


class Data(Section):
    validation: Real = Field(0.1, ge=0, lt=1, description="share of the training set held out for validation; 0: none")
    limit: Integer | None = Field(None, ge=1, description="train on a class-balanced cut of this many images")
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how a folder's image is made square")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="how images are resized (antialiased)"
    )
    bad_files: Literal["refuse", "skip"] = Field("refuse", description="what to do with unreadable images of a folder")
    max_pixels: Integer = Field(
        89_478_485,
        ge=1,
        le=2**30,
        description="pixels that an image of a folder may have; decoding takes up to 20 bytes for each, in each thread",
    )
    memory: Integer | None = Field(
        None,
        ge=1,
        description="MB that images may take on the device; more is streamed by workers; null: half the free",
    )
    workers: Integer = Field(2, ge=0, description="processes that stream a dataset over the memory budget")


class Augment(Section):
    """What happens to training images, in this order (though what is mirrored has been cropped or shifted before).

    Lengths are pixels of the last `train.resolution`; where the resolution grows they shrink with it at the beginning.
    (TrivialAugment's own are 32 pixels at any size, as its authors and torchvision have it.)
    """

    flip: Literal["random", "alternating"] | None = Field(
        None,
        description="random: mirror each image with probability 1/2; alternating: the half that is mirrored in an "
        "epoch is drawn once, and the other half is mirrored in the next",
    )
    crop_padding: Integer = Field(
        0, ge=0, le=512, description="random crop after padding each side by so many black pixels"
    )
    translate: Integer = Field(
        0, ge=0, le=512, description="random shift by up to so many pixels each way; what comes in is the mirror image"
    )
    policy: Literal["trivial_augment", "rand_augment"] | None = Field(
        None, description="trivial_augment: one operation of any strength; rand_augment: several of a given strength"
    )
    rand_augment_ops: Integer = Field(2, ge=1, le=16, description="operations an image, one after the other")
    rand_augment_magnitude: Integer = Field(9, ge=0, le=30, description="their strength, of 30")
    brightness: Real = Field(0.0, ge=0, le=1, description="colour jitter: factors from 1 - x to 1 + x")
    contrast: Real = Field(0.0, ge=0, le=1, description="colour jitter: factors from 1 - x to 1 + x")
    saturation: Real = Field(0.0, ge=0, le=1, description="colour jitter: factors from 1 - x to 1 + x")
    hue: Real = Field(0.0, ge=0, le=0.5, description="colour jitter: turns by -x to x of the colour circle")
    cutout: Integer = Field(0, ge=0, le=MAX_SIDE, description="blank a square of this side, its centre anywhere")
    erasing: Real = Field(
        0.0, ge=0, le=1, description="probability of blanking a random rectangle (RandomErasing, 2 to 33 % of the area)"
    )
    views: Integer | None = Field(
        None,
        ge=1,
        description="draw so many versions of each image, an epoch each, and then go through them again; null: always "
        "new ones; frozen stages can be computed once a version",
    )

    @property
    def random(self) -> bool:
        """Whether images differ from epoch to epoch."""
        return any(value for name, value in self if name not in ("rand_augment_ops", "rand_augment_magnitude", "views"))

    @property
    def cycle(self) -> int | None:
        """After how many epochs images come again as they were; None: never."""
        return self.views if self.random else 1

    @model_validator(mode="after")
    def _alternating_views_are_even(self) -> Augment:
        if self.flip == "alternating" and self.views is not None and self.views % 2:
            raise ValueError(
                f"views {self.views} is odd, and with flip 'alternating' each image takes turns: make it even, or flip "
                "random"
            )
        return self

    @model_validator(mode="after")
    def _one_shift(self) -> Augment:
        if self.crop_padding and self.translate:
            raise ValueError("crop_padding and translate both shift the image: set one of them to 0")
        return self


def _check_freeze_late(value: Any) -> Any:
    """Our own sentence for what is not a progression of stages."""
    if value is None:
        return value
    pairs = value if isinstance(value, list | tuple) else [value]
    good = [
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and type(pair[0]) in (int, float)
        and 0 < pair[0] < 1
        and type(pair[1]) is int
        and pair[1] >= 1
        for pair in pairs
    ]
    if not pairs or not all(good):
        raise ValueError(
            "expected pairs of a share of the run (more than 0, less than 1) and so many stages, as in [[0.8, 3]], "
            f"not {shown(value)}"
        )
    for column in zip(*pairs, strict=True):
        if list(column) != sorted(set(column)):
            raise ValueError(
                f"shares and stages must rise from pair to pair, as in [[0.6, 1], [0.8, 3]], not {shown(value)}"
            )
    return tuple((float(share), stages) for share, stages in pairs)


Progression = tuple[tuple[Real, Integer], ...]


def _check_pretrained(value: Any) -> Any:
    if isinstance(value, bool) or (
        isinstance(value, str) and value.endswith((".safetensors", ".pth", ".pt")) and is_path(value)
    ):
        return value
    raise ValueError(f"expected true, false or the path of a .safetensors or .pth file, not {shown(value)}")


class Model(Section):
    name: str = Field(description="the network; 'cifarlab models' lists them")
    pretrained: Annotated[Boolean | str, BeforeValidator(_check_pretrained)] = Field(
        False, description="start from pretrained weights: true, or a .safetensors or .pth file"
    )
    head: Literal["new", "keep"] = Field(
        "new",
        description="new: a fresh last layer with one output a class; keep: the network's own, with its (1,000) "
        "outputs: the loss is over all of them, scores are over the first ones",
    )
    widths: tuple[Annotated[Integer, Field(ge=4, le=4096)], ...] | None = Field(
        None,
        min_length=1,
        max_length=4,
        description="channels of the groups of the network 'racing'; null: 64, 256, 256",
    )
    depths: tuple[Annotated[Integer, Field(ge=2, le=3)], ...] | None = Field(
        None,
        min_length=1,
        max_length=4,
        description="convolutions of each group of 'racing', 2 or 3 (the last two a residual block); null: 2",
    )
    freeze_stages: Integer = Field(0, ge=0, description="so many stages, from the input on, never train")
    freeze_late: Annotated[Progression | None, BeforeValidator(_check_freeze_late)] = Field(
        None,
        description="[[0.8, 3]]: from 80 % of the run on the first 3 stages train no more, and need no backward",
    )
    freeze_backbone: Duration | None = Field(None, description="train only the head for this long")
    whitening_bias: Duration | None = Field(
        None,
        description="train the bias of a whitening layer for so long, its learning rate falling to 0; null: to the end",
    )
    cache: Literal["float32", "bfloat16"] | None = Field(
        "bfloat16",
        description="keep what frozen stages compute, in this precision, for each version of an image "
        "(augment.views); null: compute it anew",
    )
    cache_memory: Integer | None = Field(
        None, ge=1, description="MB that the cache may take; what doesn't fit is computed anew; null: half the free"
    )

    @model_validator(mode="after")
    def _late_is_more(self) -> Model:
        if self.freeze_late is not None and self.freeze_late[0][1] <= self.freeze_stages:
            raise ValueError(
                f"freeze_late begins with {self.freeze_late[0][1]} stages, and freeze_stages has frozen "
                f"{self.freeze_stages} from the beginning; give it more"
            )
        return self

    def frozen_stages(self, share: float) -> int:
        """How many stages don't train once that share of the run is done."""
        late = (stages for since, stages in self.freeze_late or () if share >= since)
        return max(self.freeze_stages, *late, 0)


class Loss(Section):
    label_smoothing: Real = Field(0.0, ge=0, lt=1, description="share of the target spread over all outputs")
    class_weights: Literal["balanced"] | None = Field(
        None, description="balanced: weigh each class by images / (classes x images of the class)"
    )
    mixup: Real = Field(
        0.0, ge=0, le=100, description="alpha: blend each image with another, shares from Beta(alpha, alpha)"
    )
    cutmix: Real = Field(
        0.0, ge=0, le=100, description="alpha: paste a rectangle of another image, its area from Beta(alpha, alpha)"
    )


class NumericsChoice(Section):
    """How arithmetic is done: what `auto` found to be the fastest, as it stands in a run's recipe.yaml."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of convolutions and matrix products (autocast); the weights stay float32"
    )
    channels_last: Boolean = Field(False, description="how images and convolution weights lie in memory")
    compile: Boolean | Literal["frozen"] = Field(
        False, description="compile the training step (torch.compile); frozen: only the stages that don't train"
    )
    tf32: Boolean = Field(False, description="let a GPU round float32 products to 10 bits")
    benchmark: Boolean = Field(
        False, description="let cuDNN time its ways of each convolution first: seconds to half a minute at the start"
    )
    graphs: Boolean = Field(
        False, description="replay a step's kernels as a CUDA graph, so that none waits for the processor to launch it"
    )
    fourier: Boolean = Field(
        False, description="compute 3x3 convolutions of small maps by their frequencies, for CPUs; not with compile"
    )

    @model_validator(mode="after")
    def _fourier_is_eager(self) -> NumericsChoice:
        if self.fourier and self.compile:
            raise ValueError("fourier and compile don't go together; leave one of them out")
        return self

    def __str__(self) -> str:
        parts = [
            "tf32" if self.tf32 and self.dtype == "float32" else self.dtype,
            "channels last" if self.channels_last else "channels first",
            {False: "eager", True: "compiled", "frozen": "frozen stages compiled"}[self.compile],
            *(["benchmarked"] if self.benchmark else []),
            *(["as CUDA graphs"] if self.graphs else []),
            *(["small maps by frequencies"] if self.fourier else []),
        ]
        return ", ".join(parts)


def _check_numerics(value: Any) -> Any:
    if value in ("auto", "exact") or isinstance(value, NumericsChoice):
        return value
    if isinstance(value, dict):
        try:
            return NumericsChoice.model_validate(value)
        except ValidationError as error:  # here, as pydantic would tell it for each kind of value that this could be
            first = error.errors()[0]
            field = "".join(f"{part}: " for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{field}{message[:1].lower()}{message[1:]}") from None
    raise ValueError(
        "expected exact (fp32, eager, deterministic), auto (the fastest here, by measurement) or a choice such as "
        f"{{dtype: bfloat16, channels_last: true}}, not {shown(value)}"
    )


def _whole(epochs: float) -> float:
    # 50.0 is 50: the same recipe has one fingerprint.
    return int(epochs) if epochs == int(epochs) else epochs


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE


def _check_resolution(value: Any) -> Any:
    """Our own sentence for what is neither a side nor a progression of sides."""
    if value is None or _is_side(value):
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"expected pixels from 1 to {MAX_SIDE}, or [[share of the run, pixels], ...], not {shown(value)}"
        )
    shares = []
    for pair in value:
        good = isinstance(pair, list | tuple) and len(pair) == 2 and _is_side(pair[1])
        if not good or isinstance(pair[0], bool) or not isinstance(pair[0], int | float) or not 0 <= pair[0] < 1:
            raise ValueError(
                f"expected pairs of a share of the run (0 to less than 1) and pixels (1 to {MAX_SIDE}), not {pair!r}"
            )
        shares.append(float(pair[0]))
    if not shares or shares[0] != 0 or shares != sorted(set(shares)):
        raise ValueError(f"the shares must begin with 0 and rise, as in [[0, 64], [0.3, 96]], not {shown(value)}")
    return tuple((share, pair[1]) for share, pair in zip(shares, value, strict=True))


def _check_batch_size(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"expected a number of images from 1 on, or auto, not {shown(value)}")


class Prune(Section):
    """InfoBatch (arXiv 2303.04947): what is learned already sits out some epochs."""

    share: Real = Field(
        0.5,
        gt=0,
        lt=1,
        description="probability that an image whose last loss was below the mean is left out of an epoch; those that "
        "stay count for them",
    )
    until: Real = Field(0.875, gt=0, le=1, description="share of the run from which on every image is trained on again")


class Train(Section):
    epochs: Annotated[Integer | Real, AfterValidator(_whole)] = Field(
        gt=0, description="passes over the training images"
    )
    batch_size: Annotated[Integer | Literal["auto"], BeforeValidator(_check_batch_size)] = Field(
        128, description="images in a step; auto: as many as are fastest here, the learning rate scaled with them"
    )
    accumulate: Integer = Field(
        1, ge=1, description="parts that a batch is computed in, to save memory; the step is that of the whole batch"
    )
    resolution: Annotated[Integer | Progression | None, BeforeValidator(_check_resolution)] = Field(
        None,
        description="resize images to this side; [[0, 64], [0.3, 96]]: to 64, from 30 % of the run on to 96; null: as "
        "they are",
    )
    sync_batchnorm: Boolean = Field(
        True,
        description="where several processes train together: BatchNorm normalises by all images of a batch, as in one "
        "process; false: each process by its own, and running statistics are their means",
    )
    prune: Prune | None = Field(
        None,
        description="leave out images that are learned already, as InfoBatch does; batches are smaller by them: "
        "{share: 0.5}",
    )
    clip_grad_norm: Real | None = Field(None, gt=0, description="scale gradients down to at most this norm")
    ema: Real | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights and buffers, kept and validated beside them",
    )
    early_stopping: Integer | None = Field(
        None, ge=1, description="stop after so many epochs in a row without a better validation accuracy"
    )
    checkpoint_every: Duration | None = Field(
        Duration(minutes=10), description="keep a checkpoint to go on from this often; null: only when it is stopped"
    )
    keep: Integer = Field(2, ge=1, description="how many of the latest checkpoints stay, besides the best")
    retries: Integer = Field(
        0,
        ge=0,
        le=3,
        description="where the loss becomes NaN or infinite: so often back to the last checkpoint, and on from there "
        "with half of the learning rates",
    )
    numerics: Annotated[Literal["auto", "exact"] | NumericsChoice, BeforeValidator(_check_numerics)] = Field(
        "auto",
        description="exact: fp32, eager, deterministic; auto: the fastest here, by a short measurement; or the choice "
        "itself, as in {dtype: bfloat16, channels_last: true}",
    )

    @model_validator(mode="after")
    def _parts_are_not_empty(self) -> Train:
        if self.batch_size != "auto" and self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate ({self.accumulate}) must not be more than batch_size ({self.batch_size}): a part has at "
                "least one image"
            )
        return self

    @model_validator(mode="after")
    def _compiled_batches_have_one_size(self) -> Train:
        if self.prune is not None and isinstance(self.numerics, NumericsChoice) and self.numerics.compile:
            raise ValueError(
                "prune makes batches of many sizes, and numerics.compile compiles for one: set compile to false, or "
                "prune to null"
            )
        return self

    @property
    def batch(self) -> int:
        """`batch_size`, once it is decided."""
        if self.batch_size == "auto":
            raise ValueError("train.batch_size 'auto' has not been decided yet")
        return self.batch_size

    @property
    def resolutions(self) -> tuple[tuple[float, int | None], ...]:
        """(share of the run from which on, side) in rising order; the side None leaves images as they are."""
        if isinstance(self.resolution, tuple):
            return self.resolution
        return ((0.0, self.resolution),)

    @property
    def last_resolution(self) -> int | None:
        return self.resolutions[-1][1]


def check_tta(value: Any) -> Any:
    """The value, if `evaluate.tta` may have it. Raises ValueError."""
    if value is None or value in ("flip", "crops", "diagonal", "auto") or (type(value) is int and 2 <= value <= 1000):
        return value
    raise ValueError(
        "expected flip, crops, diagonal, auto (the better on validation), a number of augmented views from 2 to 1000, "
        f"or null, not {shown(value)}"
    )


class Evaluate(Section):
    tta: Annotated[Literal["flip", "crops", "diagonal", "auto"] | Integer | None, BeforeValidator(check_tta)] = Field(
        None,
        description="test-time augmentation, probabilities averaged: flip (2 views), crops (10), diagonal (6), so many "
        "augmented views, or auto: the best of none, flip and crops on validation",
    )
    tta_below: Real | None = Field(
        None,
        gt=0,
        le=1,
        description="only for images whose most likely class has less than this probability; null: for all",
    )
    resolution: Integer | None = Field(
        None, ge=1, le=MAX_SIDE, description="side of images in evaluation; null: the last of train.resolution"
    )
    test: Boolean = Field(True, description="score the test set once, at the end")
    batch_size: Annotated[Integer | Literal["auto"], BeforeValidator(_check_batch_size)] = Field(
        "auto", description="images in an evaluation batch; auto: by their size, and by the memory of a GPU"
    )

    @property
    def batch(self) -> int:
        """`batch_size`, once it is decided."""
        if self.batch_size == "auto":
            raise ValueError("evaluate.batch_size 'auto' has not been decided yet")
        return self.batch_size
