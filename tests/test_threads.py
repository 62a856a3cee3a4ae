"""How many threads and how they wait: chosen by what was measured, and set before libgomp looks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgelora.base import ggml
from runtime.openmp import SPINS
from runtime.threads import ROUNDS, TOKENS, choose_threads


class Machine:
    """A context whose decodes take milliseconds by the number of threads, and its clock."""

    def __init__(self, milliseconds, monkeypatch):
        self.milliseconds, self.threads, self.used, self.now = milliseconds, 0, [], 0.0
        monkeypatch.setattr("runtime.threads.time.perf_counter", lambda: self.now)

    def set_threads(self, threads):
        self.threads = threads

    def clear(self):
        pass

    def decode(self, _):
        self.used.append(self.threads)
        self.now += self.milliseconds[self.threads] / 1000


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ({1: 3, 2: 2}, "2"),
        ({1: 2, 2: 30}, "1"),
        ({1: 2.0, 2: 2.0}, "1"),  # about the same: the other core is left to others
        ({1: 9, 2: 5, 3: 3, 4: 2}, "4"),
        ({1: 9, 2: 5, 3: 3, 4: 9}, "3"),
    ],
)
def test_the_fewest_threads_that_are_about_the_fastest(milliseconds, chosen, monkeypatch):
    machine = Machine(milliseconds, monkeypatch)
    choice = choose_threads(machine, len(milliseconds))
    assert choice.value == chosen == str(machine.threads)
    assert all(f"with {n}" in choice.why for n in milliseconds)


def test_what_is_hopeless_is_not_measured_again(monkeypatch):
    machine = Machine({1: 2, 2: 40}, monkeypatch)
    choose_threads(machine, 2)
    assert machine.used.count(2) == 2  # one to wake the threads, one that takes longer than four may
    assert machine.used.count(1) == ROUNDS * (TOKENS + 1)


def test_one_core_needs_no_measure(monkeypatch):
    machine = Machine({1: 2}, monkeypatch)
    assert choose_threads(machine, 1).value == "1"
    assert machine.used == []


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp waits so on Linux alone")
@pytest.mark.parametrize(
    ("given", "spins"), [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_openmp_is_told_how_to_wait_before_it_is_loaded(given, spins):
    if "libgomp" not in subprocess.run(["ldd", ggml.library_path()], capture_output=True, text=True).stdout:
        pytest.skip("this llama.cpp was built without libgomp")
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, runtime.binding; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**own, "OMP_DISPLAY_ENV": "verbose", **given}, capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert done.stdout.strip() == given.get("GOMP_SPINCOUNT", "None")  # children wait as they always did
