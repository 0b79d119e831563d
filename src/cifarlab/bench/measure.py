"""Rounds of cifarlab's loop and of another, taking turns: what the machine does meanwhile falls on both alike.

Two processes at a time, so that a laptop has room for them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from cifarlab.bench.contenders import Job, Round, make
from cifarlab.errors import CifarlabError, RunError

STEPS_AT_LEAST = 3


@dataclass(frozen=True)
class Pair:
    """Images per second in each round, of cifarlab's step and of another beside it. failed: why there are none."""

    contender: str
    ours: tuple[float, ...] = ()
    theirs: tuple[float, ...] = ()
    failed: str | None = None

    @property
    def ratio(self) -> float | None:
        """Our images per second over theirs, of the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs) if self.theirs else None


def measure(
    contenders: Sequence[str], job: Job, rounds: int, progress: Callable[[str], None], *, beside: str = "ours"
) -> list[Pair]:
    """Each contender beside one of our own: `ours`, or `ceiling`. Raises RunError where that one fails."""
    pairs = []
    progress(f"starting {beside}")
    with _Contender(beside, job) as ours:
        if ours.failed is not None:
            raise RunError(ours.failed)
        for contender in contenders:
            progress(f"starting {contender}")
            with _Contender(contender, job) as theirs:
                rates: list[tuple[float, float]] = []
                for number in range(rounds):
                    progress(f"{contender}: round {number + 1} of {rounds}")
                    first, second = (ours, theirs) if number % 2 else (theirs, ours)
                    found = {side: side.round() for side in (first, second)}
                    if ours.failed is not None:
                        raise RunError(ours.failed)
                    own, other = found[ours], found[theirs]
                    if own is None or other is None:
                        break
                    rates.append((own, other))
            if theirs.failed is not None:
                pairs.append(Pair(contender, failed=theirs.failed))
            else:
                pairs.append(Pair(contender, tuple(own for own, _ in rates), tuple(other for _, other in rates)))
    return pairs


class _Contender:
    """A contender in a process of its own."""

    def __init__(self, name: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.failed: str | None = None
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, job))
        self._process.start()
        theirs.close()
        self._receive()

    def __enter__(self) -> _Contender:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._end.send(False)
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def round(self) -> float | None:
        """Images per second; None where it failed, now or before."""
        if self.failed is None:
            with contextlib.suppress(OSError):  # it died since: there is nothing to receive either
                self._end.send(True)
            return self._receive()
        return None

    def _receive(self) -> float | None:
        try:
            answer = self._end.recv()
        except (EOFError, OSError):
            self.failed = "its process died; is memory full?"
            return None
        if isinstance(answer, str):
            self.failed = answer
            return None
        return float(answer)


def _serve(connection: Connection, name: str, job: Job) -> None:
    """A contender's process: sends the rate of a round for each True that comes, or why it failed."""
    try:
        one_round = make(name, job)
        steps = _steps(one_round, job.seconds)
        connection.send(0.0)
        while connection.recv():
            connection.send(steps[1] * job.batch_size / one_round(steps))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # whoever asked has gone
    except CifarlabError as error:
        connection.send(str(error))
    except Exception as error:  # somebody else's loop: whatever it is, the others go on
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _steps(one_round: Round, length: float) -> tuple[int, int]:
    """How many steps, not timed and timed, make a round of about that length in seconds."""
    timed = STEPS_AT_LEAST
    while True:
        seconds = one_round((1, timed))
        if seconds > length / 4 or timed >= 256:
            timed = max(STEPS_AT_LEAST, round(timed * length * 0.75 / seconds))
            return max(1, timed // 3), timed
        timed *= 4
