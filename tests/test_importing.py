"""Python's garbage collector rests while a command imports, and then only."""

from __future__ import annotations

import gc

import pytest

from edgelora.cli.importing import uncollected


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_the_collector_rests_while_a_command_imports():
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_imported_is_not_walked_through_again():
    frozen = gc.get_freeze_count()
    with uncollected():
        held = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= frozen + len(held)


def test_an_import_that_fails_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError), uncollected():
        raise ModuleNotFoundError
    assert gc.isenabled()
