"""Downloads against a local server that is slow, cut off, wrong, moved, absent or overloaded."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cifar_files import BINARY_FOLDER, Tiny, tiny, write_archive, write_parquet, write_python
from cifarlab import download
from cifarlab.data import cifar_download
from cifarlab.data.cifar import read_cifar, read_contents
from cifarlab.data.cifar_download import OFFICIAL_HOST, default_sources, fetch
from cifarlab.download import AnnouncedFile, Courier, Patience, RemoteFile, Source, Wanted, cache_folder, deliver
from cifarlab.errors import DataError, DownloadError
from local_server import Server, cut, forget_settings, in_turn, send_head, serving, slow, status, whole

PATIENCE = Patience(minimum_speed=0, window=0.3, timeout=5, tries=3, backoff=1)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_settings(monkeypatch)


# --- What is downloaded -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """A tiny dataset on a server, as parquet ("hub") and as an archive ("official"), and an empty folder for it."""

    data: Tiny
    server: Server
    files: dict[str, bytes]  # by path on the server
    hub: Source
    official: Source
    folder: Path
    lines: list[str]
    naps: list[float]

    def fetch(self, *sources: Source, patience: Patience = PATIENCE) -> Path:
        chosen = sources or (self.hub, self.official)
        return fetch(
            self.data.name,
            self.folder,
            sources=chosen,
            report=self.lines.append,
            patience=patience,
            sleep=self.naps.append,
        )

    def refusal(self, *sources: Source) -> str:
        with pytest.raises(DownloadError) as caught:
            self.fetch(*sources)
        assert caught.value.exit_code == 3 and isinstance(caught.value, DataError)
        assert not (self.folder / BINARY_FOLDER[self.data.name]).exists()
        return str(caught.value)

    def origin(self) -> str:
        dataset = read_cifar(self.data.name, self.folder)
        assert dataset is not None and dataset.test is not None
        for found, expected in ((dataset.train, self.data.train), (dataset.test, self.data.test)):
            np.testing.assert_array_equal(found.pixels.reshape(-1, 3072), expected.pixels)
            np.testing.assert_array_equal(found.labels, expected.labels)
        assert dataset.classes == tuple(self.data.classes)
        return dataset.source.partition("downloaded from ")[2]


TRAIN, TEST = "/hub/train-00000-of-00001.parquet", "/hub/test-00000-of-00001.parquet"


@pytest.fixture(params=["cifar10"])
def world(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> World:
    data = tiny(request.param)
    parquet = write_parquet(data, tmp_path / "origin")
    archive = write_archive(data, tmp_path / "origin")
    files = {f"/hub/{path.name}": path.read_bytes() for path in sorted(parquet.iterdir(), reverse=True)}
    hub = Source("the hub", tuple(remote(server, path, content, parquet.name) for path, content in files.items()))
    files[f"/official/{archive.name}"] = archive.read_bytes()
    official = Source("the official host", (remote(server, *list(files.items())[-1]),))
    server.routes = {path: whole(content) for path, content in files.items()}
    return World(data, server, files, hub, official, tmp_path / "cache", [], [])


def remote(server: Server, path: str, content: bytes, folder: str = "") -> RemoteFile:
    name = path.rpartition("/")[2]
    digests = hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()
    return RemoteFile(server.url + path, f"{folder}/{name}" if folder else name, len(content), *digests)


def pinned(source: Source) -> tuple[RemoteFile, ...]:
    """The files of a source all of whose files are pinned."""
    assert all(isinstance(file, RemoteFile) for file in source.files)
    return tuple(file for file in source.files if isinstance(file, RemoteFile))


ARCHIVE = "/official/cifar-10-python.tar.gz"


# --- When all is well -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["cifar10", "cifar100"], indirect=True)
@pytest.mark.parametrize("which", ["hub", "official"])
def test_a_download_gives_the_dataset_and_tells_its_origin(world: World, which: str) -> None:
    source = world.hub if which == "hub" else world.official
    assert world.fetch(source) == world.folder
    digests = "; ".join(f"{file.filename} with SHA-256 {file.sha256}" for file in source.files)
    assert world.origin() == f"{source.name}; {digests}"
    assert sorted(path.name for path in world.folder.iterdir() if not path.name.endswith(".lock")) == [
        ".downloads",
        BINARY_FOLDER[world.data.name],
    ]
    assert list((world.folder / ".downloads").iterdir()) == []
    assert any("downloading" in line and "MB" in line for line in world.lines)
    assert world.naps == []


def test_the_second_source_is_not_asked_when_the_first_delivers(world: World) -> None:
    world.fetch()
    assert world.server.paths() == [TRAIN, TEST]


def test_a_second_call_downloads_nothing(world: World) -> None:
    world.fetch()
    world.fetch()
    assert len(world.server.requests) == 2


def test_two_runs_at_once_download_once(world: World) -> None:
    world.server.routes[TRAIN] = slow(world.files[TRAIN], speed=400_000)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(world.fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [world.folder] * 2
    assert sorted(world.server.paths()) == sorted([TRAIN, TEST])
    assert "another run is downloading CIFAR-10; waiting for it" in world.lines
    world.origin()


def test_a_redirect_is_followed_and_keeps_the_range(world: World) -> None:
    data = world.files[TRAIN]
    world.server.routes["/cdn"] = in_turn(cut(data, 5000), whole(data))
    world.server.routes[TRAIN] = status(302, Location=f"{world.server.url}/cdn")
    world.fetch()
    assert world.server.requests[:4] == [(TRAIN, None), ("/cdn", None), (TRAIN, "bytes=5000-"), ("/cdn", "bytes=5000-")]
    assert world.origin().startswith("the hub")


# --- Sources that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [403, 404, 416])
def test_what_is_not_there_sends_to_the_next_source_at_once(world: World, code: int) -> None:
    world.server.routes[TRAIN] = status(code)
    world.fetch()
    assert world.server.paths() == [TRAIN, ARCHIVE]
    assert world.origin().startswith("the official host")
    assert f"leaving the hub: HTTP {code}" in world.lines


@pytest.mark.parametrize("code", [429, 503])
def test_an_overloaded_server_is_asked_again_with_growing_pauses_and_then_left(world: World, code: int) -> None:
    world.server.routes[TRAIN] = status(code)
    world.fetch()
    assert world.server.paths() == [TRAIN] * 3 + [ARCHIVE]
    assert world.naps == [1, 2]
    assert f"leaving the hub: HTTP {code} (3 tries)" in world.lines


def test_a_server_that_recovers_is_used_and_its_wish_for_a_pause_honoured(world: World) -> None:
    world.server.routes[TRAIN] = in_turn(status(503, Retry_After="7"), whole(world.files[TRAIN]))
    world.fetch()
    assert world.server.paths() == [TRAIN, TRAIN, TEST]
    assert world.naps == [7]


def test_a_pause_of_hours_is_not_waited_for(world: World) -> None:
    world.server.routes[TRAIN] = in_turn(status(429, Retry_After="7200"), whole(world.files[TRAIN]))
    world.fetch()
    assert world.naps == [30]


def test_a_cut_connection_is_resumed_where_it_broke(world: World) -> None:
    data = world.files[TRAIN]
    world.server.routes[TRAIN] = in_turn(cut(data, 10_000), cut(data, 20_000), whole(data))
    world.fetch()
    assert [wanted for path, wanted in world.server.requests if path == TRAIN] == [
        None,
        "bytes=10000-",
        "bytes=30000-",
    ]
    assert world.origin().startswith("the hub")


def test_a_connection_that_breaks_often_but_brings_much_is_not_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_ENOUGH_PROGRESS", 8_000)
    data = world.files[TRAIN]
    world.server.routes[TRAIN] = cut(data, 10_000)
    world.fetch()
    assert world.server.paths().count(TRAIN) == -(-len(data) // 10_000) > 5
    assert world.origin().startswith("the hub")


def test_a_connection_that_only_ever_brings_a_little_is_given_up(world: World) -> None:
    world.server.routes[TRAIN] = cut(world.files[TRAIN], 1000)
    world.fetch()
    assert world.server.paths() == [TRAIN] * 3 + [ARCHIVE]


def test_a_server_that_cannot_resume_starts_again(world: World) -> None:
    data = world.files[TRAIN]
    world.server.routes[TRAIN] = in_turn(cut(data, 10_000), whole(data, ranges=False))
    world.fetch()
    assert world.origin().startswith("the hub")


def test_a_stream_without_a_length_that_ends_early_is_resumed(world: World) -> None:
    data = world.files[TRAIN]
    world.server.routes[TRAIN] = in_turn(whole(data[:9000], announced=False), whole(data))
    world.fetch()
    assert world.server.requests[1] == (TRAIN, "bytes=9000-")
    assert world.origin().startswith("the hub")


def test_another_part_than_was_asked_for_is_not_appended(world: World) -> None:
    data = world.files[TRAIN]

    def from_zero(h: Any, start: int) -> None:
        h.send_response(206)
        h.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
        h.send_header("Content-Length", str(len(data) - start))
        h.end_headers()
        h.wfile.write(data[: len(data) - start])

    world.server.routes[TRAIN] = in_turn(cut(data, 10_000), from_zero)
    world.fetch()
    assert "leaving the hub: sent another part of the file than was asked for" in world.lines


def test_an_interrupted_download_goes_on_in_the_next_run(world: World) -> None:
    data = world.files[TRAIN]
    world.server.routes[TRAIN] = in_turn(cut(data, 10_000), status(404))
    world.refusal(world.hub)
    world.server.routes[TRAIN] = whole(data)
    world.fetch(world.hub)
    assert world.server.requests[-2:] == [(TRAIN, "bytes=10000-"), (TEST, None)]
    world.origin()


@pytest.mark.parametrize("size", [100, -1, 0, 5000])
def test_a_damaged_part_is_thrown_away_and_downloaded_again(world: World, size: int) -> None:
    # Shorter, one byte short, as long and longer than the file.
    length = len(world.files[TRAIN])
    part = world.folder / ".downloads" / "cifar10" / "0" / "plain_text" / f"{Path(TRAIN).name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (100 if size == 100 else length + size))
    world.fetch()
    assert world.origin().startswith("the hub")


def test_a_stalled_connection_is_left(world: World) -> None:
    def stall(h: Any, start: int) -> None:
        send_head(h, len(world.files[TRAIN]), 0)
        h.wfile.write(world.files[TRAIN][:100])
        world.server.released.wait(20)

    world.server.routes[TRAIN] = stall
    world.fetch(patience=dataclasses.replace(PATIENCE, timeout=0.2, tries=1))
    assert "leaving the hub: no answer within 0.2 s (1 tries)" in world.lines
    assert world.origin().startswith("the official host")


# --- Wrong bytes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose files were opened as a dataset."""
    folders: list[Path] = []

    def spy(cifar: Any, folder: Path) -> Any:
        folders.append(folder)
        return read_contents(cifar, folder)

    monkeypatch.setattr(cifar_download, "read_contents", spy)
    return folders


def test_wrong_bytes_are_thrown_away_unopened_and_the_next_source_asked(world: World, opened: list[Path]) -> None:
    wrong = bytearray(world.files[TRAIN])
    wrong[1000] ^= 1
    world.server.routes[TRAIN] = whole(bytes(wrong))
    message = world.refusal(world.hub)
    digest = hashlib.sha256(wrong).hexdigest()
    assert f"has SHA-256 {digest} instead of {world.hub.files[0].sha256}" in message
    assert opened == []
    assert world.server.requests == [(TRAIN, None)]
    assert not list(world.folder.rglob("*.part*")) and not list(world.folder.rglob("*.parquet"))
    world.fetch()
    assert world.origin().startswith("the official host")
    assert opened == [world.folder / ".downloads" / "cifar10" / "1"]


def test_the_md5_must_be_right_too(world: World, opened: list[Path]) -> None:
    file = dataclasses.replace(pinned(world.official)[0], md5="0" * 32)
    assert f"instead of {'0' * 32}" in world.refusal(dataclasses.replace(world.official, files=(file,)))
    assert opened == []


@pytest.mark.parametrize("announced", [True, False])
def test_another_file_in_its_place_is_refused(world: World, opened: list[Path], announced: bool) -> None:
    data = world.files[TRAIN]
    world.server.routes[TRAIN] = whole(data + b"x", announced=announced)
    reason = f"{len(data) + 1:,} bytes, not {len(data):,}" if announced else f"sent more than the {len(data):,} bytes"
    assert reason in world.refusal(world.hub)
    world.server.routes[TRAIN] = whole(b"<html>log in to the hotel's network</html>", announced=announced)
    assert "bytes" in world.refusal(world.hub)
    assert opened == []


def test_a_compressed_answer_is_refused(world: World) -> None:
    world.server.routes[TRAIN] = status(200, Content_Encoding="gzip")
    assert "an encoding that was not asked for" in world.refusal(world.hub)


def test_a_wrong_file_that_another_source_left_is_not_opened(world: World, opened: list[Path]) -> None:
    # The archive is preferred by the reader; this one lies where a parquet download is about to go.
    place = world.folder / ".downloads" / "cifar10"
    for number in ("0", "1"):
        (place / number).mkdir(parents=True)
        (place / number / Path(ARCHIVE).name).write_bytes(b"not an archive")
    world.server.routes[TRAIN] = status(404)
    world.fetch()
    assert world.origin().startswith("the official host")


# --- Speed ------------------------------------------------------------------------------------------------------------


def test_a_source_that_crawls_is_left_for_the_next(world: World) -> None:
    world.server.routes[TRAIN] = slow(world.files[TRAIN], speed=100_000)
    patience = dataclasses.replace(PATIENCE, minimum_speed=1_000_000)
    began = time.monotonic()
    world.fetch(patience=patience)
    assert time.monotonic() - began < 5
    assert world.origin().startswith("the official host")
    assert world.server.paths() == [TRAIN, ARCHIVE]
    left = next(line for line in world.lines if line.startswith("leaving the hub: only "))
    assert float(left.split()[4]) <= 125  # kB/s: what the server sent, and a portion for the start


def test_where_all_crawl_the_fastest_is_resumed_and_used_to_the_end(world: World) -> None:
    world.server.routes[TRAIN] = slow(world.files[TRAIN], speed=40_000)
    world.server.routes[ARCHIVE] = slow(world.files[ARCHIVE], speed=150_000)
    world.fetch(patience=dataclasses.replace(PATIENCE, minimum_speed=10_000_000))
    assert world.server.paths() == [TRAIN, ARCHIVE, ARCHIVE]
    resumed = world.server.requests[-1][1]
    assert resumed is not None and int(resumed[6:-1]) > 10_000
    assert any(line.startswith("no source is faster; going on with the official host") for line in world.lines)
    assert world.origin().startswith("the official host")


def test_a_crawling_source_is_better_than_one_that_fails(world: World) -> None:
    world.server.routes[TRAIN] = slow(world.files[TRAIN], speed=200_000)
    world.server.routes[ARCHIVE] = status(404)
    world.fetch(patience=dataclasses.replace(PATIENCE, minimum_speed=10_000_000))
    assert world.server.paths()[:3] == [TRAIN, ARCHIVE, TRAIN]
    assert world.origin().startswith("the hub")


def test_speed_is_measured_over_the_window_and_not_over_all(world: World) -> None:
    # By a clock that moves a second at every look, a window of three seconds holds three portions.
    ticks = iter(range(10_000))
    courier = Courier(world.lines.append, Patience(window=3), lambda: float(next(ticks)), world.naps.append)
    file = dataclasses.replace(pinned(world.hub)[0], size=10**9)
    portions = [bytes(3000)] * 30 + [bytes(10)] * 30
    with Path(os.devnull).open("wb") as out, pytest.raises(download._CrawlsError) as caught:
        courier.copy(iter(portions), out, file, 0, "x", minimum_speed=1000)
    assert caught.value.speed == 10
    assert sum(line.startswith(file.filename) for line in world.lines) == 6  # every five seconds


# --- Files that the server describes ----------------------------------------------------------------------------------


CONTENT = bytes(range(256)) * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def on_the_hub(server: Server, size: int = len(CONTENT), etag: str = f'"{SHA256}"') -> None:
    """At /model a redirect that describes the file, as the Hub's do, to a store that answers no HEAD."""

    def store(h: Any, start: int) -> None:
        (status(403) if h.command == "HEAD" else whole(CONTENT))(h, start)

    headers = {"X_Linked_Size": str(size), "X_Linked_Etag": etag}
    server.routes = {"/model": status(302, Location=f"{server.url}/store", **headers), "/store": store}


def bring(server: Server, folder: Path, sha256: str | None, naps: list[float] | None = None) -> bytes:
    """What `deliver` leaves of /model, for a file whose digest begins with `sha256`, or is the server's to say."""
    naps = [] if naps is None else naps
    source = Source("the hub", (AnnouncedFile(f"{server.url}/model", "model.bin", sha256),))
    wanted = Wanted("the model", by_hand="train one")
    _, place = deliver(wanted, (source,), folder, Courier(lambda line: None, PATIENCE, sleep=naps.append))
    assert [path.name for path in place.iterdir()] == ["model.bin"]
    return (place / "model.bin").read_bytes()


def test_the_hub_says_what_a_file_is_before_it_sends_it(server: Server, tmp_path: Path) -> None:
    on_the_hub(server)
    assert bring(server, tmp_path, None) == CONTENT
    assert server.heads[0] == "/model" and server.paths() == ["/model", "/store"]


def test_what_the_hub_sends_must_be_what_it_said(server: Server, tmp_path: Path) -> None:
    on_the_hub(server, etag='"' + "0" * 64 + '"')
    with pytest.raises(DownloadError, match=f"the hub: model.bin has SHA-256 {SHA256} instead of {'0' * 64}"):
        bring(server, tmp_path, None)
    on_the_hub(server, size=len(CONTENT) + 1)
    with pytest.raises(DownloadError, match="has another file than the pinned one: 25,600 bytes, not 25,601"):
        bring(server, tmp_path, None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("digits", [8, 10, 64])
def test_the_beginning_of_a_digest_is_checked(server: Server, tmp_path: Path, digits: int) -> None:
    server.routes["/model"] = whole(CONTENT)
    assert bring(server, tmp_path / "right", SHA256[:digits]) == CONTENT
    wrong = SHA256[: digits - 1] + ("0" if SHA256[digits - 1] != "0" else "1")
    with pytest.raises(DownloadError, match=f"has SHA-256 {SHA256} instead of {wrong}\\);"):
        bring(server, tmp_path / "wrong", wrong)


def test_a_digest_that_is_known_is_not_the_servers_to_say(server: Server, tmp_path: Path) -> None:
    on_the_hub(server)
    with pytest.raises(DownloadError, match=f"has SHA-256 {SHA256} instead of {'0' * 8}"):
        bring(server, tmp_path, "0" * 8)


@pytest.mark.parametrize("etag", ["", '"0123"', "W/" + "0" * 62, "g" * 64])
def test_a_file_without_any_digest_is_not_fetched(server: Server, tmp_path: Path, etag: str) -> None:
    on_the_hub(server, etag=etag)
    with pytest.raises(DownloadError, match=r"the hub: announces no SHA-256 of model.bin"):
        bring(server, tmp_path, None)
    assert server.requests == []


def test_a_file_without_a_size_is_not_fetched(server: Server, tmp_path: Path) -> None:
    server.routes["/model"] = whole(CONTENT, announced=False)
    with pytest.raises(DownloadError, match=r"the hub: does not say how large model.bin is"):
        bring(server, tmp_path, SHA256)
    assert server.requests == []


def test_a_server_that_is_overloaded_is_asked_again_what_a_file_is(server: Server, tmp_path: Path) -> None:
    naps: list[float] = []
    server.routes["/model"] = in_turn(status(503, Retry_After="7"), whole(CONTENT))
    assert bring(server, tmp_path, SHA256, naps) == CONTENT
    assert (naps, server.heads) == ([7], ["/model"] * 2)
    server.routes["/model"] = status(503)
    with pytest.raises(DownloadError, match=r"the hub: HTTP 503 \(3 tries\)"):
        bring(server, tmp_path / "other", SHA256, naps)
    assert naps == [7, 1, 2]
    server.routes["/model"] = status(404)
    with pytest.raises(DownloadError, match=r"could not download the model \(the hub: HTTP 404\); .+, or train one"):
        bring(server, tmp_path / "other", SHA256, naps)
    assert len(naps) == 3


def test_space_is_checked_for_what_the_server_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(server, size=2_000_000_000)
    usage = shutil.disk_usage("/")._replace(free=1_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        DownloadError, match=r"has 1,500 MB of free space, and the download needs 2,000 MB; free some, or c"
    ):
        bring(server, tmp_path, None)
    assert server.requests == []


# --- No way -----------------------------------------------------------------------------------------------------------


def test_when_nothing_works_one_sentence_says_all(world: World) -> None:
    world.server.routes[TRAIN] = status(404)
    world.server.routes[ARCHIVE] = status(503)
    message = world.refusal()
    assert message == (
        "could not download CIFAR-10 (the hub: HTTP 404; the official host: HTTP 503 (3 tries)); check the network and "
        "try again, or put cifar-10-batches-py/, cifar-10-batches-bin/, cifar-10-python.tar.gz, cifar-10-binary.tar.gz "
        "or plain_text/train-00000-of-00001.parquet and test-00000-of-00001.parquet into "
        f"{world.folder} by hand, or name the folder that has it with --data"
    )


def test_without_a_network_there_is_a_sentence(world: World) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    file = dataclasses.replace(pinned(world.official)[0], url=url)
    message = world.refusal(Source("nobody", (file,)))
    assert "could not download CIFAR-10 (nobody: " in message and "refused" in message
    assert world.naps == [1, 2]


@pytest.mark.parametrize("url", ["hf-mirror.example/x", "ftp://example/x", "http://[broken/x"])
def test_an_address_that_is_none_is_a_sentence_too(world: World, url: str) -> None:
    file = dataclasses.replace(pinned(world.official)[0], url=url)
    assert "could not download CIFAR-10 (odd: " in world.refusal(Source("odd", (file,)))


def test_a_circle_of_redirects_ends(world: World) -> None:
    world.server.routes[TRAIN] = status(302, Location=f"{world.server.url}{TRAIN}")
    assert "redirects" in world.refusal(world.hub)


def test_a_proxy_that_cannot_be_used_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def client(**settings: Any) -> None:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr(httpx, "Client", client)
    assert "the proxy that is set in the environment cannot be used: Using SOCKS" in world.refusal()


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_the_network_is_not_touched(world: World, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(httpx, "Client", lambda **settings: pytest.fail("network"))
    message = world.refusal()
    assert message.startswith("CIFAR-10 can't be downloaded because HF_HUB_OFFLINE is set; unset it, or put cifar-10-")
    assert world.server.requests == []
    assert not world.folder.exists()


def test_offline_can_be_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    world.fetch()
    world.origin()


# --- Disks ------------------------------------------------------------------------------------------------------------


def test_too_little_space_is_told_before_anything_is_downloaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=150_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = world.refusal()
    assert "has 150 MB of free space, and the download needs 185 MB" in message and str(world.folder) in message
    assert world.server.requests == []


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`th flush of a file to the disk fails, as on a full disk."""
    calls = iter(range(1, 10_000))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode) and next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


# Two downloads, then the eight files of the binary form.
@pytest.mark.parametrize("flush", [1, 2, 3, 4, 10])
def test_a_full_disk_is_told_and_what_was_there_stays_whole(
    world: World, monkeypatch: pytest.MonkeyPatch, flush: int
) -> None:
    write_python(tiny("cifar100"), world.folder)
    before = {path: path.read_bytes() for path in world.folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        fill_disk_at(patch, flush)
        assert "the disk is full; free some space and try again" in world.refusal(world.hub)
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in world.folder.iterdir() if path.is_dir()].count(
        ".cifar-10-batches-bin.unfinished"
    ) == 0
    # What was downloaded is not downloaded again.
    requests = len(world.server.requests)
    world.fetch(world.hub)
    assert len(world.server.requests) - requests == {1: 1, 2: 0}.get(flush, 0)
    world.origin()


def test_a_stop_while_unpacking_leaves_no_half_dataset(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def stop(old: Path, new: Path) -> None:
        if old.is_dir():
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            world.fetch()
    assert read_cifar("cifar10", world.folder) is None
    world.fetch()
    assert len(world.server.requests) == 2
    world.origin()


def test_a_folder_that_cannot_be_made_is_told(world: World, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DownloadError, match="a file stands where a folder is needed"):
        world.fetch()


# --- What is pinned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_archives_are_pinned_as_torchvision_pins_them(name: str) -> None:
    from torchvision import datasets

    theirs = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    file = pinned(default_sources(name)[1])[0]
    assert (file.url, file.filename, file.md5) == (theirs.url, theirs.filename, theirs.tgz_md5)
    assert file.url.startswith(OFFICIAL_HOST)


def test_the_hub_comes_first_at_a_fixed_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, official = default_sources("cifar10")
    assert hub.files[0].url == (
        "https://huggingface.co/datasets/uoft-cs/cifar10/resolve/0b2714987fa478483af9968de7c934580d0bb9a2/"
        "plain_text/train-00000-of-00001.parquet"
    )
    assert sum(file.size for file in pinned(hub)) == 143_646_105  # `download_size` in the README of that revision
    assert pinned(official)[0].size == 170_498_071
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert default_sources("cifar100")[0].files[1].url == (
        "https://mirror.example/datasets/uoft-cs/cifar100/resolve/aadb3af77e9048adbea6b47c21a81e47dd092ae5/"
        "cifar100/test-00000-of-00001.parquet"
    )


def test_every_pin_is_a_digest_and_no_two_are_alike() -> None:
    files = [file for name in ("cifar10", "cifar100") for source in default_sources(name) for file in pinned(source)]
    assert len(files) == len({file.sha256 for file in files}) == 6
    for file in files:
        assert len(file.sha256) == 64 and int(file.sha256, 16) and file.size > 20_000_000


def test_the_cache_folder_is_the_user_s_or_the_one_that_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import platformdirs

    assert cache_folder() == platformdirs.user_cache_path("cifarlab")
    monkeypatch.setenv("CIFARLAB_DATA", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("CIFARLAB_DATA", "~/data")
    assert cache_folder() == Path.home() / "data"
    monkeypatch.setenv("CIFARLAB_DATA", "")
    assert cache_folder() == platformdirs.user_cache_path("cifarlab")
