"""Loading the compiled code: what does not fit is left alone with a line that says so."""

from __future__ import annotations

import shutil
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from edgelora.kernels import load

pytestmark = pytest.mark.skipif(load.library() is None, reason="no compiler was here at installation")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The compiled file, with its sources beside it, in a folder of their own."""
    built = next(path for suffix in EXTENSION_SUFFIXES if (path := load.HERE / f"native{suffix}").exists())
    for path in (built, *load.sources()):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(load, "HERE", tmp_path)
    load.library.cache_clear()
    yield tmp_path / built.name
    load.library.cache_clear()


@pytest.mark.usefixtures("elsewhere")
def test_it_is_loaded_where_it_fits():
    assert load.library() is not None


@pytest.mark.usefixtures("elsewhere")
def test_without_sources_it_is_trusted():
    for path in load.sources():
        path.unlink()
    assert load.library() is not None


def test_what_was_compiled_from_other_code_is_not_called(elsewhere, caplog):
    (elsewhere.parent / "layers.c").write_text("// another version", encoding="utf-8")
    assert load.library() is None
    assert "compiled from other code" in caplog.text


def test_a_file_that_is_cut_is_left_alone(elsewhere, caplog):
    elsewhere.write_bytes(elsewhere.read_bytes()[:100])
    assert load.library() is None
    assert "training on a CPU is slower" in caplog.text


def test_one_that_is_not_there_is_nothing_to_talk_about(elsewhere, caplog):
    elsewhere.unlink()
    assert load.library() is None
    assert not caplog.text
