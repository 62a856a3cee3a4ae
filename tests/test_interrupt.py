"""The signals that stop a run: what the first and the second do, and what stays as it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from edgelora.training.interrupt import SIGNALS, interruptible

HANG_UP = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this platform has no SIGHUP")


TWICE = [one for one in SIGNALS if one.name != "SIGHUP"]


@pytest.mark.parametrize("number", TWICE, ids=lambda one: one.name)
def test_the_first_signal_asks_and_the_second_stops(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with interruptible() as interrupt:
        os.kill(os.getpid(), number)
        assert (interrupt.asked, interrupt.exit_code) == (number, 128 + number)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
            os.kill(os.getpid(), number)
    assert caught.type is (KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    assert getattr(caught.value, "code", 130) == 128 + number
    assert [signal.getsignal(one) for one in SIGNALS] == before


@HANG_UP
@pytest.mark.parametrize("first", SIGNALS, ids=lambda one: one.name)
def test_a_closed_terminal_costs_no_step_however_often_it_is_told_of(first):
    """bash sends SIGHUP to its jobs when it gets one, and ends, whereupon the system sends them another."""
    with interruptible() as interrupt:
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            os.kill(os.getpid(), number)
    assert interrupt.exit_code == 128 + first


def test_the_first_one_is_told_of_at_once_and_the_second_is_not():
    """From another thread: this one may be in a long product, or hold the lock of what is written to."""
    told, lock, came = [], threading.Lock(), threading.Event()

    def tell():
        with lock:
            told.append(threading.current_thread())
        came.set()

    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with interruptible(tell):
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
        assert came.wait(10)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert len(told) == 1
    assert told[0] is not threading.main_thread()
    assert not told[0].is_alive()
    assert signal.set_wakeup_fd(before) == before


def test_where_no_signal_comes_nothing_is_told():
    told = []
    with interruptible(lambda: told.append(1)):
        pass
    assert told == []


@HANG_UP
def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)
