"""The folders of a sweep's trials: one for each, whatever is swept."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest

from edgelora.config import TrainConfig
from edgelora.files.atomic import MOST_BYTES
from edgelora.training.sweep import trials_of

TEXT = "prompt_tuning_init_text"


@pytest.fixture
def names(tmp_path):
    """`names(*words)`: what the trials of these words are called."""
    config = TrainConfig(base="b.gguf", data="d.jsonl", valid="v.jsonl", out=tmp_path / "mine")

    def of(*words):
        trials = trials_of(config, words)
        assert [trial.config.out.name for trial in trials] == [trial.name for trial in trials]
        return [trial.name for trial in trials]

    return of


def test_values_that_are_written_alike_have_folders_of_their_own(names):
    first, second, other = names(f"{TEXT}=turn on,turn-on,off")
    assert [name.partition("~")[0] for name in (first, second)] == [f"{TEXT}=turn-on"] * 2
    assert first != second
    assert other == f"{TEXT}=off"  # as it was called before any were alike
    assert names(f"{TEXT}=off,turn-on,turn on") == [other, second, first]  # whatever the order


def test_no_trial_stands_where_the_run_of_another_does(names):
    found = names(f"{TEXT}=on,on.run")
    assert not {f"{name}.run" for name in found} & set(found)


@pytest.mark.parametrize("letter", ["x", "ö", "灯"])
def test_a_name_is_no_longer_than_disks_take(names, letter):
    long, longer = letter * 400, letter * 401
    found = names(f"{TEXT}={long},{longer}", "rank=2,4")
    assert len(set(found)) == 4
    assert all(MOST_BYTES - 4 < len(os.fsencode(name)) <= MOST_BYTES for name in found)
    assert all(name.startswith(f"{TEXT}={letter * 20}") for name in found)
    assert found == names(f"{TEXT}={long},{longer}", "rank=2,4")


def test_a_name_is_as_long_as_it_may_be(names):
    room = MOST_BYTES - len(f"{TEXT}=")
    found = names(f"{TEXT}={'x' * room},{'x' * (room + 1)}")
    assert ["~" in name for name in found] == [False, True]
    assert all(a != b for a, b in pairwise(found))


def test_a_trial_with_a_long_value_can_be_made(names, tmp_path):
    (name,) = names(f"{TEXT}={'turn the lights on ' * 30}")
    for folder in (name, f"{name}.run", f".edgelora-{name}.run-12345678"):
        (tmp_path / folder).mkdir()
