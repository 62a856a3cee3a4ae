"""The signals that stop a run: what the first and the second do, and what stays as it was."""

from __future__ import annotations

import os
import signal

import pytest

from edgelora.training.interrupt import SIGNALS, interruptible

HANG_UP = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this platform has no SIGHUP")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda one: one.name)
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
def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)
