"""One thread for what takes the disk long, so that training goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

# So many pieces of work may wait, with all that they are to write: a disk that is too slow holds training up, rather
# than filling the memory. An epoch has five.
WAITING = 8


class Writer:
    """Does pieces of work one after the other, in the order that they are given, beside the thread that gives them.

    Once one has failed, none of those after it is done, and its error is raised by the next call. The end of the `with`
    block waits until all is done, and raises the error there where the block had none of its own. An interrupt while
    it waits leaves out what has not been begun.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: list[Future[None]] = []
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            wait(self._pending)
        except BaseException as interrupt:
            self._error = self._error or interrupt
            wait(self._pending)
            raise
        finally:
            self._thread.shutdown()
        if error is None:
            self._raise()

    def do(self, work: Callable[[], object]) -> None:
        """Have `work` done. Nothing that it is going to write may change any more: give it copies."""
        self._pending = [future for future in self._pending if not future.done()]
        if len(self._pending) >= WAITING:
            wait(self._pending, return_when=FIRST_COMPLETED)
        self._raise()
        self._pending.append(self._thread.submit(self._attempt, work))

    def _attempt(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except Exception as error:
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
