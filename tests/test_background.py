"""The writer: in order, never ahead of a failure, and through to the end whatever becomes of the block."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future, wait
from functools import partial

import pytest

from cifarlab.background import WAITING, Writer


class Gate:
    """Work that says when it has begun and lasts until it is let go."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.open.wait(60)


def fail(text: str) -> None:
    raise OSError(text)


def test_work_is_done_in_order_in_one_other_thread_beside_the_one_that_gives_it() -> None:
    done: list[int] = []
    threads: set[int] = set()
    gate = Gate()

    def work(number: int) -> None:
        done.append(number)
        threads.add(threading.get_ident())

    with Writer() as writer:
        writer.do(gate)
        for number in range(WAITING - 1):
            writer.do(partial(work, number))
        assert not done  # and yet all was given
        gate.open.set()
        for number in range(WAITING - 1, 100):
            writer.do(partial(work, number))
    assert done == list(range(100))
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("writer") and thread.is_alive()]


def test_no_more_than_so_many_pieces_wait() -> None:
    gate, given = Gate(), threading.Event()

    def give() -> None:
        writer.do(lambda: None)
        given.set()

    with Writer() as writer:
        for _ in range(WAITING):
            writer.do(gate)
        giver = threading.Thread(target=give)
        giver.start()
        assert gate.begun.wait(60) and not given.wait(0.1)
        gate.open.set()
        assert given.wait(60)
        giver.join()


def test_after_a_failure_nothing_is_done_and_the_next_call_raises_it() -> None:
    done: list[str] = []
    gate, failed = Gate(), threading.Event()

    def fail_then_tell() -> None:
        try:
            fail("full")
        finally:
            failed.set()

    with pytest.raises(OSError, match="full"), Writer() as writer:
        writer.do(gate)
        writer.do(fail_then_tell)
        writer.do(lambda: done.append("after"))
        gate.open.set()
        while True:
            writer.do(lambda: done.append("later"))
            failed.wait(60)
    assert not done


def test_a_failure_that_no_later_call_meets_is_raised_at_the_end() -> None:
    with pytest.raises(OSError, match="full"), Writer() as writer:
        writer.do(partial(fail, "full"))


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(143)])
def test_a_block_s_own_error_stays_and_all_is_done_before_it_goes_on(error: BaseException) -> None:
    done: list[int] = []
    with pytest.raises(type(error)) as caught, Writer() as writer:
        for number in range(5):
            writer.do(partial(done.append, number))
        writer.do(partial(fail, "full"))
        raise error
    assert caught.value is error
    assert done == [0, 1, 2, 3, 4]


def test_an_interrupt_while_it_waits_lets_the_piece_at_hand_finish_and_leaves_out_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    gate = Gate()

    def at_hand() -> None:
        gate()
        done.append("at hand")

    calls: list[int] = []

    def interrupt_first(pending: list[Future[None]]) -> None:
        calls.append(len(pending))
        if len(calls) == 1:
            assert gate.begun.wait(60)
            raise KeyboardInterrupt
        gate.open.set()
        wait(pending)

    monkeypatch.setattr("cifarlab.background.wait", interrupt_first)
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.do(at_hand)
        writer.do(lambda: done.append("not begun"))
    assert done == ["at hand"]


def test_what_was_written_is_not_kept_in_memory() -> None:
    class Large:
        def write(self) -> None:
            pass

    with Writer() as writer:
        large = Large()
        gone = weakref.ref(large)
        writer.do(large.write)
        del large
        last = Gate()
        writer.do(last)
        assert last.begun.wait(60)
        gc.collect()
        assert gone() is None
        last.open.set()
