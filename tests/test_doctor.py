"""`cifarlab doctor`: each finding, on a machine that is made to have it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision

from cifar_files import tiny, write_python
from cifarlab import doctor, machine, numerics
from cifarlab.doctor import Finding, examine
from cifarlab.models import weights
from command import call


def found(what: str, runs: Path, data: Path | None = None) -> Finding:
    (finding,) = [finding for finding in examine(runs, data) if finding.what == what]
    return finding


def test_a_machine_that_runs_tests_can_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    code, out, err = call(capsys, monkeypatch, "doctor", "--runs", tmp_path / "runs", "--data", tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "runs can work here" and "BAD" not in out
    for what in ("Python", "packages", "processor", "threads", "memory", "runs", "cache", "cifar10", "cifar100"):
        assert f" {what}: " in out
    assert f"torch {importlib.metadata.version('torch')}, " in out and "a run downloads it, from " in out
    assert set(tmp_path.rglob("*")) == before


def test_what_is_bad_ends_with_1_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, out, _ = call(capsys, monkeypatch, "doctor", "--runs", tmp_path / "file" / "runs", "--data", tmp_path)
    assert code == 1 and out.splitlines()[-1] == "1 problem to mend"
    (number,) = [number for number, line in enumerate(out.splitlines()) if line.startswith("BAD   runs: ")]
    assert out.splitlines()[number + 1] == "      -> choose another: --runs FOLDER"


@pytest.mark.parametrize(("version", "level"), [((3, 10), "note"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "note")])
def test_pythons_that_it_is_not_tested_with(version: tuple[int, int], level: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "version_info", (*version, 1, "final", 0))
        (finding,) = doctor._python()
    assert finding.level == level and bool(finding.mend) == (level == "note")


def test_what_a_look_itself_fails_of_is_a_finding_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only a broken installation is to be installed again."""

    def refused() -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "available_memory", refused)
    findings = {finding.what: finding for finding in examine(tmp_path, tmp_path)}
    assert findings["memory"] == Finding("bad", "memory", "[Errno 13] Permission denied", "")
    assert findings["runs"].level == "ok"


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_either_package_may_be_for_another_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda of: ["numpy", "torch>=99"] if of == name else None)
    (finding,) = doctor._packages()
    assert finding.level == "bad" and finding.mend.startswith("pip install 'torch>=99', or another " + name)
    assert finding.found.startswith(f"{name} {importlib.metadata.version(name)} is for torch>=99, and torch ")


def test_a_torch_of_tomorrow_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0.0a0+git1234")
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch>=2.0"])
    assert [finding.level for finding in doctor._packages()] == ["ok"]


def test_packages_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0" if name == "torch" else version(name))
    finding = found("packages", tmp_path)
    assert finding.level == "bad" and "and torch 2.1.0 is there" in finding.found
    assert finding.mend.startswith("pip install 'torch")


def test_operators_that_are_of_another_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    finding = found("packages", tmp_path)
    assert (finding.level, finding.found) == ("bad", "operator torchvision::nms does not exist")
    assert "--force-reinstall torch torchvision" in finding.mend


def test_images_and_weights_that_are_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_python(tiny("cifar10"), tmp_path)
    assert found("cifar10", tmp_path, tmp_path).found.endswith(", whole")
    batch = next(tmp_path.rglob("data_batch_3"))
    batch.write_bytes(batch.read_bytes()[:-100])
    finding = found("cifar10", tmp_path, tmp_path)
    assert finding.level == "bad" and str(batch) in finding.found and "cifarlab data fetch cifar10" in finding.mend

    monkeypatch.setenv("CIFARLAB_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "efficientnet_v2_s-dd5fe13b.pth").write_bytes(b"half of them")
    finding = found("weights of efficientnet_v2_s", tmp_path)
    assert finding.level == "bad" and "it is damaged, or another file" in finding.found


def test_what_would_be_downloaded_and_can_not_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIFARLAB_DATA", str(tmp_path))
    assert "huggingface.co" in found("cifar100", tmp_path).found
    with monkeypatch.context() as patch:
        patch.setattr(weights, "check_local", lambda name: f"{name}.pth")
        assert [finding.found for finding in doctor._weights()] == [
            "efficientnet_v2_s.pth, whole", "efficientnet_lite0.pth, whole",
        ]  # fmt: skip
    assert "efficientnet_v2_s-dd5fe13b.pth" in found("weights of efficientnet_v2_s", tmp_path).found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for what in ("cifar100", "weights of efficientnet_v2_s"):
        finding = found(what, tmp_path)
        assert finding.level == "note" and "HF_HUB_OFFLINE is set" in finding.found
    monkeypatch.setattr(weights, "_packaged", lambda: None)
    assert "cifarlab[offline]" in found("weights of efficientnet_lite0", tmp_path).mend


class Usage(NamedTuple):
    free: float


@pytest.mark.parametrize(
    ("free", "levels"),
    [(5e7, ("bad", "bad", "note")), (1e9, ("note", "note", "note")), (1e11, ("ok", "ok", "ok"))],
)
def test_memory_and_room(free: float, levels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: int(free))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
    levels_found = {finding.what: finding.level for finding in examine(tmp_path, tmp_path)}
    assert tuple(levels_found[what] for what in ("memory", "runs", "cache")) == levels
    if Path("/dev/shm").is_dir():
        assert levels_found.get("shared memory") == ("note" if free < 256e6 else None)


def test_room_is_looked_for_where_the_folder_would_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looked: list[Path] = []

    def usage(place: Path) -> Usage:
        looked.append(place)
        return Usage(3e9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setenv("CIFARLAB_DATA", str(tmp_path))
    folder = tmp_path / "not" / "there" / "yet"
    assert [finding.found for finding in doctor._disk(folder)] == [f"{folder}, 3.0 GB free", f"{tmp_path}, 3.0 GB free"]
    assert looked == [tmp_path, tmp_path]


def test_fewer_threads_than_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    about = machine.describe(torch.device("cpu")) | {"threads": 1, "cores": 8}
    monkeypatch.setattr(machine, "describe", lambda _: about)
    finding = found("threads", tmp_path)
    assert (
        finding.level == "note" and finding.found.startswith("1 of the 8 cores") and "OMP_NUM_THREADS" in finding.mend
    )


@pytest.mark.parametrize("fast", [True, False])
def test_what_a_processor_does_itself(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: fast)
    monkeypatch.setattr(numerics, "can_compile", lambda _: fast)
    findings = {finding.what: finding for finding in doctor._processor()}
    assert ("computes bfloat16 itself" in findings["processor"].found) == fast
    assert ("only emulates bfloat16" in findings["processor"].found) != fast
    assert ("torch.compile" in findings) != fast
    assert fast or findings["torch.compile"].level == "note"


# --- GPUs, pretended ----------------------------------------------------------------------------


def gpu(monkeypatch: pytest.MonkeyPatch, convolution: Callable[..., torch.Tensor] | None = None) -> None:
    """One that computes on the CPU. convolution: instead of its own."""
    randn = torch.randn
    pretended = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda _: "NVIDIA Pretended",
        "get_device_capability": lambda _: (3, 5),
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "mem_get_info": lambda _: (int(3e9), int(4e9)),
        "is_bf16_supported": lambda including_emulation: False,
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "randn", lambda *size, device, **more: randn(*size, **more))
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    if convolution is not None:
        monkeypatch.setattr(torch.nn.functional, "conv2d", convolution)


def test_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu(monkeypatch)
    findings = [finding for finding in examine(tmp_path, tmp_path) if finding.what == "GPU 0"]
    assert [finding.level for finding in findings] == ["ok"]
    assert findings[0].found == "NVIDIA Pretended, 3.0 of 4.0 GB free, no bfloat16 but emulated"


def test_a_gpu_that_this_torch_is_not_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    gpu(monkeypatch, refused)
    finding = found("GPU 0", tmp_path)
    assert finding.level == "bad" and "--device cpu" in finding.mend
    assert "(sm_35) can't run this torch, which is for sm_80, sm_90: CUDA error: no kernel image" in finding.found


class Spoiled(torch.autograd.Function):
    """NaN instead of the result, or of its gradient, which then is all there is of NaN."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, forwards: bool) -> torch.Tensor:
        ctx.forwards = forwards
        return output * torch.nan if forwards else output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(gradient) if ctx.forwards else gradient * torch.nan, None


@pytest.mark.parametrize("forwards", [True, False])
def test_a_gpu_whose_float16_gives_nan(forwards: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    convolution, calls = torch.nn.functional.conv2d, []

    def spoiled(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        output = convolution(*arguments)
        return Spoiled.apply(output, forwards) if len(calls) == 2 else output

    gpu(monkeypatch, spoiled)
    findings = [finding for finding in doctor._gpu() if finding.what == "GPU 0"]
    assert [(finding.level, finding.found) for finding in findings][1:] == [
        ("note", "float16 convolutions give NaN on it")
    ]


def test_a_gpu_that_fails_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = torch.nn.functional.conv2d

    def refused(gradient: torch.Tensor) -> None:
        raise RuntimeError("cuDNN error")

    def failing(*arguments: Any) -> torch.Tensor:
        output = convolution(*arguments)
        output.register_hook(refused)  # type: ignore[no-untyped-call]
        return output

    gpu(monkeypatch, failing)
    assert [(finding.level, "cuDNN error" in finding.found) for finding in doctor._gpu()] == [("bad", True)] * 2


def test_a_gpu_that_others_have_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((0.4, 3)[device.index] * 1e9), int(4e9)))
    full, other = doctor._gpu()
    assert full == Finding(
        "bad", "GPU 0", "NVIDIA Pretended, 400 MB of its memory are free", "what else is running? nvidia-smi says"
    )
    assert (other.level, other.what) == ("ok", "GPU 1")


def test_a_machine_without_a_gpu_and_one_of_apples(monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(Path, "exists", lambda path: "nvidia" not in str(path) and exists(path))
    assert list(doctor._gpu()) == [Finding("ok", "GPU", "none; runs use the processor")]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert list(doctor._gpu()) == [Finding("ok", "GPU", "Apple's, by MPS")]


@pytest.mark.parametrize(("cuda", "said"), [(None, "a build for the CPU"), ("13.0", "for CUDA 13.0) can't use it")])
def test_a_gpu_that_torch_can_not_use(
    cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = found("GPU", tmp_path)
    assert finding.level == "note" and said in finding.found and finding.mend


@pytest.mark.parametrize(
    ("version", "place", "levels"),
    [
        ("Linux microsoft", "/mnt/c/images", ["note"]),
        ("Linux microsoft", "/home/me", ["ok"]),
        ("Linux microsoft", "/mnt/data/images", ["ok"]),
        ("Linux microsoft", "/home/c/images", ["ok"]),
        ("Linux generic", "/mnt/c/images", []),
    ],
)
def test_linux_in_windows_with_the_data_on_the_other_side(
    version: str, place: str, levels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **_: version if str(path) == "/proc/version" else read(path))
    assert [finding.level for finding in doctor._windows(Path(place))] == levels
    monkeypatch.setenv("CIFARLAB_DATA", place)
    assert [finding.level for finding in doctor._windows(None)] == levels
