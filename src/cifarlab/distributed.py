"""Several processes that train one network together: who they are, what they exchange, how a dead one is noticed.

torchrun starts them, on one machine or many, each with the same command, and says to each which it is. Each has the
whole network, and computes its rows of every batch; then gradients are added up, and all take the same step. The first
one writes the run folder, and decides what a clock decides. Alone, which is the rule, every function here gives back
what it was given.

Gradients and BatchNorm's sums go from device to device (NCCL, or gloo on CPUs); all else by gloo, as bytes of JSON or
of torch.save, read with `weights_only`: nothing that is received is executed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psutil

from cifarlab import errors, machine
from cifarlab.errors import CifarlabError, RunError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A process tells that it lives every so many seconds, and counts as dead after so many in which it did not; after fewer
# where an exchange with somebody has failed. One that is stuck in an exchange with a dead one has so long to find out.
TICK, SILENCE, SUSPICION, GRACE = 1.0, 12.0, 4.0, 5.0
# So long may an answer of the store take.
ANSWER = timedelta(seconds=6)
# What waits for others waits this long: one may be decoding images meanwhile. The dead are found in another way, though
# not while the processes meet.
PATIENCE, MEETING = timedelta(hours=12), timedelta(minutes=5)

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is; rank counts from 0. `here` is among those of the same machine."""

    rank: int = 0
    size: int = 1
    here: int = 0


_place = Place()
# The groups that sums go through, from device to device, and all else.
_devices: Any = None
_control: Any = None
_watch: _Watch | None = None
_last_words: Callable[[str], object] | None = None


def place() -> Place:
    return _place


def is_first() -> bool:
    """Whether this is the process that writes and shows; alone it is."""
    return _place.rank == 0


@contextlib.contextmanager
def last_words(say: Callable[[str], object]) -> Iterator[None]:
    """In which `say` is called with the reason, in the first process, where it must end for want of the others while it
    waits for them."""
    global _last_words
    before, _last_words = _last_words, say if is_first() else _last_words
    try:
        yield
    finally:
        _last_words = before


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In which this process works by itself, whatever the others do."""
    global _place
    before, _place = _place, Place()
    try:
        yield
    finally:
        _place = before


def began_before() -> float | None:
    """When torchrun began, as `time.time()`, where it has started these processes again; None where it hasn't.

    Known to the first process; on each machine torchrun counts by itself.
    """
    own = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if _place.size == 1 or not any(everyones(own)):
        return None
    return from_first(lambda: psutil.Process(os.getppid()).create_time())


# --- coming and going -------------------------------------------------------------------------


def join(device_name: str) -> torch.device:
    """Meet the others, where torchrun started this process; returns the device that this one is to use.

    Raises UsageError where there is no such device for each; RunError where the others can't be met.
    """
    global _place, _devices, _control, _watch
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return machine.choose_device(device_name)
    import torch
    from torch import distributed

    found = Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    device = _own_device(device_name, found)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            *address, is_master=found.rank == 0 and not hosted, wait_for_workers=False, timeout=MEETING
        )
        token = _meet(store, found, device.type)
        own = distributed.PrefixStore(token, store)  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=own, rank=found.rank, world_size=found.size, timeout=MEETING)
        _control = distributed.new_group(backend="gloo", timeout=PATIENCE)
        _devices = distributed.new_group(backend=backend, timeout=PATIENCE) if backend == "nccl" else _control
        _place = found
        _watch = _Watch(found, token)
        everyones(None)  # each has told that it lives before anybody looks
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes of torchrun can't reach one another: {' '.join(str(error).split())}") from error
    _watch.start()
    return device


def _meet(store: Any, own: Place, kind: str) -> str:
    """A name for these processes, which those that torchrun started before them, and that are dead, did not have.

    The store outlives them, and a process that found the address of a dead one there would try to reach it. The first
    calls all by the numbers that they drew, until each has answered to its own. kind: of device, the same for all.
    Raises RuntimeError where some don't come, UsageError where their devices are of two kinds.
    """
    number, deadline = os.urandom(8).hex(), time.monotonic() + MEETING.total_seconds()
    store.set(f"cifarlab/here/{own.rank}", json.dumps([number, kind]))
    called: list[list[str]] = []
    token = number
    while True:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all {own.size} of them came within {MEETING.total_seconds():.0f} seconds")
        if own.rank == 0:
            here = [json.loads(store.get(f"cifarlab/here/{rank}")) for rank in range(own.size)]
            if here != called:
                called = here
                store.set("cifarlab/call", json.dumps([token, [drawn for drawn, _ in here]]))
            keys = [f"cifarlab/answer/{rank}" for rank in range(1, own.size)]
            if store.check(keys) and all(answer == token.encode() for answer in store.multi_get(keys)):
                store.set(f"cifarlab/kinds/{token}", json.dumps([found for _, found in here]))
                break
        elif store.check(["cifarlab/call"]):
            token, numbers = json.loads(store.get("cifarlab/call"))
            if len(numbers) == own.size and numbers[own.rank] == number:
                store.set(f"cifarlab/answer/{own.rank}", token)
                break
        time.sleep(0.05)
    kinds = json.loads(store.get(f"cifarlab/kinds/{token}"))
    if len(set(kinds)) > 1:
        raise UsageError(f"some of torchrun's processes use {' and some '.join(sorted(set(kinds)))}; give --device cpu")
    return str(token)


def _own_device(name: str, found: Place) -> torch.device:
    import torch

    if ":" in name:
        raise UsageError(
            f"--device {name} is one device, and torchrun started {found.size} processes; give cuda or cpu"
        )
    device = machine.choose_device(name)
    if device.type == "mps":
        if name == "mps":
            raise UsageError("--device mps is for one process; torchrun's can use cpu and cuda")
        return torch.device("cpu")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if machine.processes_here() > count:
        raise UsageError(
            f"torchrun started {machine.processes_here()} processes on this machine, which has {count} GPU(s); start "
            "one for each GPU, or give --device cpu"
        )
    return torch.device("cuda", found.here)


def leave(complaint: str | None = None) -> bool:
    """Tell the others that this process ends, and why, where that is an error. Returns whether it is to be said here.

    What the first process says too, as it found the same, is said once.
    """
    global _watch, _place
    watch, _watch = _watch, None
    if watch is None:
        return True
    said = watch.farewell(complaint)
    if complaint is None:
        from torch import distributed

        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()
        _place = Place()
    return said


# --- what is exchanged ------------------------------------------------------------------------


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, which alone does it: plain values and tensors (on the CPU).

    Its CifarlabErrors are raised in each process.
    """
    if _place.size == 1:
        return work()
    import torch

    if is_first():
        buffer = io.BytesIO()
        try:
            found = work()
        except CifarlabError as error:
            torch.save((type(error).__name__, str(error), None), buffer)
            _broadcast(buffer.getvalue())
            raise
        torch.save(("", "", found), buffer)
        _broadcast(buffer.getvalue())
        return found
    name, said, received = torch.load(io.BytesIO(_broadcast(b"")), map_location="cpu", weights_only=True)
    if name:
        kind = getattr(errors, name, None)
        raise (kind if isinstance(kind, type) and issubclass(kind, CifarlabError) else RunError)(said)
    result: T = received
    return result


def everyones(value: Any) -> list[Any]:
    """Each process's value, JSON-ready, in the order of their ranks."""
    if _place.size == 1:
        return [value]
    import torch

    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist())) for row in _gathered(data, _sizes(len(data)))]


def check_same(what: str, value: dict[str, Any]) -> None:
    """Raises RunError, the same in each process, where one has another entry of `value` than the first."""
    (host, first), *others = everyones([socket.gethostname(), value])
    for rank, (its_host, other) in enumerate(others, 1):
        for name in first:
            if other[name] != first[name]:
                raise RunError(
                    f"process {rank} on {its_host} has another {what} than process 0 on {host}: {name} is "
                    f"{other[name]!r} instead of {first[name]!r}; give all of them the same"
                )


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes, on the CPU, in the order of their ranks; counts: how many each has."""
    if _place.size == 1:
        return rows
    import torch

    return torch.cat(_gathered(rows.cpu().contiguous(), counts))


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over all processes, in one exchange, from device to device."""
    if _place.size == 1 or not tensors:
        return
    import torch

    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    with _explained():
        torch.distributed.all_reduce(flat, group=_devices)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Give tensors the first process's values, in place."""
    if _place.size == 1:
        return
    import torch

    with _explained(), torch.no_grad():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            torch.distributed.broadcast(whole, 0, group=_devices)
            tensor.copy_(whole)


class Votes:
    """What a signal or a clock asks for in some process, done by all after the same step.

    An exchange takes as long as a small step, so nobody waits for it: what comes of a vote is known one step later.
    """

    def __init__(self) -> None:
        self._pending: tuple[Any, Tensor] | None = None
        self._saved = False

    def cast(self, signal: int | None, save: bool) -> tuple[int | None, bool]:
        """signal: which this process was sent, if any. save: whether it is time to. Returns what was asked for by
        anybody: now, where there is nobody else, else at the last call."""
        if _place.size == 1:
            return signal, save
        import torch

        signal_of_all, save_of_all = self.result()
        # The vote that was on its way while it was saved asks for the same again.
        self._saved = save_of_all = save_of_all and not self._saved
        # Only the first one's clock counts.
        mine = torch.tensor([-1 if signal is None else signal, int(save and is_first())])
        with _explained():
            work = torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, group=_control, async_op=True)
        self._pending = (work, mine)
        return signal_of_all, save_of_all

    def result(self) -> tuple[int | None, bool]:
        """What came of the last vote; waits for it. To be called once no more are cast."""
        if self._pending is None:
            return None, False
        work, values = self._pending
        self._pending = None
        with _explained():
            work.wait()
        signal, save = values.tolist()
        return (None if signal < 0 else signal), bool(save)


def _broadcast(data: bytes) -> bytes:
    import torch

    size = torch.tensor([len(data)])
    with _explained():
        torch.distributed.broadcast(size, 0, group=_control)
        whole = torch.empty(int(size), dtype=torch.uint8)
        if is_first():
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        torch.distributed.broadcast(whole, 0, group=_control)
    return whole.numpy().tobytes()


def _sizes(mine: int) -> list[int]:
    import torch

    found = [torch.zeros(1, dtype=torch.int64) for _ in range(_place.size)]
    with _explained():
        torch.distributed.all_gather(found, torch.tensor([mine]), group=_control)
    return [int(size) for size in found]


def _gathered(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Each process's rows; gloo wants the same number from each."""
    import torch

    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts]
    with _explained():
        torch.distributed.all_gather(found, padded, group=_control)
    return [found[rank][:count] for rank, count in enumerate(counts)]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """An exchange that fails, as RunError that names the process that is not there any more."""
    try:
        yield
    except RuntimeError as error:
        if machine.is_out_of_memory(error):
            raise
        verdict = _watch.verdict() if _watch is not None else None
        raise RunError(
            verdict or f"an exchange between the processes failed: {' '.join(str(error).split())[:200]}"
        ) from error


# --- who lives --------------------------------------------------------------------------------


class _Sign(NamedTuple):
    """What a process last told of itself, and when that was first seen here."""

    text: bytes
    since: float


class _Watch(threading.Thread):
    """Tells the others every second that this process lives, and finds out which of them don't.

    By way of the store that torchrun's processes met by. Needed as NCCL may wait for a dead process without end, and as
    gloo, which doesn't, can't say which one died. Two threads, as the store may not answer at all.
    """

    def __init__(self, own: Place, token: str) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        super().__init__(name="watch", daemon=True)
        self._own, self._token = own, token
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=ANSWER)
        self._talking = threading.Thread(target=self._talk, name="talk", daemon=True)
        self._found: list[bytes] = []
        self._answered = time.monotonic()
        self._lost: str | None = None
        self._cut = False
        self._suspicious = False
        self._ending = threading.Event()
        self._tell({"count": 0})

    def run(self) -> None:
        self._talking.start()
        signs: dict[int, _Sign] = {}
        looked = time.monotonic()
        while self._lost is None:
            if self._ending.wait(TICK / 2):
                return
            now = time.monotonic()
            if now - looked > SILENCE / 2:  # it is this process that was away: stopped, or the machine asleep
                signs.clear()
                self._answered = now
            looked = now
            if now - self._answered > SILENCE:
                self._cut = True
                self._lost = (
                    f"the connection to {os.environ['MASTER_ADDR']}, by which the processes of this run find one "
                    "another, is lost"
                )
            else:
                self._lost = self._judge(self._found, signs, now)
        if not self._ending.wait(GRACE):
            # The main thread is in an exchange that never ends.
            with contextlib.suppress(Exception):
                if _last_words is not None:
                    _last_words(self._lost)
            sys.stderr.write(f"cifarlab: {errors.printable(self._lost)}\n")
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(RunError.exit_code)

    def _talk(self) -> None:
        count = 0
        while not self._ending.wait(TICK):
            count += 1
            with contextlib.suppress(RuntimeError, ValueError):  # `run` sees that there is no answer
                self._tell({"count": count})
                self._found = self._look()
                self._answered = time.monotonic()

    def _judge(self, found: list[bytes], signs: dict[int, _Sign], now: float) -> str | None:
        """The sentence for the first process that is not there any more, if there is one."""
        for rank, text in enumerate(found):
            if rank not in signs or signs[rank].text != text:
                signs[rank] = _Sign(text, now)
            said = json.loads(text)
            if rank == self._own.rank or said.get("done"):
                continue
            who = f"process {rank} of {self._own.size} (on {said['host']}, pid {said['pid']})"
            if "complaint" in said:
                return f"{who} has ended: {said['complaint']}"
            silence = now - signs[rank].since
            if silence > (SUSPICION if self._suspicious else SILENCE):
                return f"{who} is gone: no sign of life for {silence:.0f} seconds; what it was at can be gone on with"
        return None

    def verdict(self) -> str | None:
        """Who is gone, where an exchange has failed; waits until that is known."""
        self._suspicious = True
        deadline = time.monotonic() + SILENCE
        while self._lost is None and time.monotonic() < deadline:
            time.sleep(0.1)
        self._ending.set()
        return self._lost

    def farewell(self, complaint: str | None) -> bool:
        """See `leave`."""
        self._ending.set()
        if self._cut:  # the store would not answer
            return True
        if self._talking.is_alive():
            self._talking.join(SILENCE)
        with contextlib.suppress(RuntimeError, ValueError):
            self._tell({"done": True} if complaint is None else {"complaint": complaint})
            deadline = time.monotonic() + SILENCE
            alike = complaint is not None and not is_first() and self._lost is None
            while alike and time.monotonic() < deadline:
                said = json.loads(self._look()[0])
                if "complaint" in said:
                    return bool(said["complaint"] != complaint)
                time.sleep(0.1)
        return True

    def _key(self, rank: int) -> str:
        return f"cifarlab/{self._token}/{rank}"

    def _tell(self, what: dict[str, Any]) -> None:
        self._store.set(
            self._key(self._own.rank), json.dumps({**what, "host": socket.gethostname(), "pid": os.getpid()})
        )

    def _look(self) -> list[bytes]:
        found: list[bytes] = self._store.multi_get([self._key(rank) for rank in range(self._own.size)])
        return found
