"""A base with a tied head and the same with one of its own: the same bytes, and in llama.cpp the same logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from same_tokens import IDS
from test_export import make_adapter
from test_vectors import FAMILIES, family

from converters.untie import write_untied
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import ExportError
from edgelora.evaluate.fidelity import fidelity
from edgelora.peft.adapter import write_adapter
from edgelora.pipeline.export import export
from edgelora.pipeline.untie import untie
from runtime.scorer import ScoringEngine

__all__ = ["family"]


def in_llama_cpp(base) -> np.ndarray:
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        return engine.logits([IDS.tolist()], [list(range(len(IDS)))])


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q6_K], ids=lambda kind: kind.name)
def test_its_logits_in_llama_cpp_are_bit_for_bit_those_of_the_tied(make_tiny, tmp_path, kind):
    base = open_base(make_tiny(kind).path)
    write_untied(tmp_path / "untied.gguf", base)
    untied = open_base(tmp_path / "untied.gguf")
    assert (base.config.tie_word_embeddings, untied.config.tie_word_embeddings) == (True, False)
    assert {*untied.file.tensors} - {*base.file.tensors} == {"output.weight"}
    for name in untied.file.tensors:
        source = "token_embd.weight" if name == "output.weight" else name
        np.testing.assert_array_equal(untied.file.rows(name), base.file.rows(source))
    np.testing.assert_array_equal(in_llama_cpp(untied), in_llama_cpp(base))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reads_a_head_of_its_own(family, tmp_path, name):
    base = open_base(family(name).gguf)
    write_untied(tmp_path / "untied.gguf", base)
    found = fidelity([(in_llama_cpp(base), in_llama_cpp(open_base(tmp_path / "untied.gguf")))])
    assert (found.kl_max, found.same_top) == (0.0, 1.0)


def test_the_tied_bases_adapters_fit_it(tiny, tmp_path):
    """Whoever trained layers over the one may run them over the other."""
    base = open_base(tiny.path)
    assert not untie(tiny.path, tmp_path / "untied.gguf").certificate.faults
    untied = open_base(tmp_path / "untied.gguf")
    assert untied.fingerprint == base.fingerprint
    write_adapter(tmp_path / "mine", make_adapter(base))
    assert export(untied.path, tmp_path / "mine", tmp_path / "mine.gguf").passed


def test_the_command_writes_it_and_refuses_it_a_second_time(tiny, tmp_path, capsys):
    out = tmp_path / "untied.gguf"
    assert run(["untie", str(tiny.path), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["certificate"]["passed"]
    assert told["size_bytes"] == out.stat().st_size
    assert run(["untie", str(out), "--out", str(tmp_path / "again.gguf")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {out}: it has a head of its own already",
        "  why: only a model whose head is its embedding can be untied",
        "  fix: use it as it is",
    ]


def test_a_family_whose_head_llama_cpp_does_not_read_is_refused(family, tmp_path, monkeypatch):
    base = open_base(family("llama").gguf)
    monkeypatch.setattr("converters.base_to_gguf.unlike_llama_cpp", lambda _, c: [] if c.tie_word_embeddings else ["x"])
    with pytest.raises(ExportError, match="would compute otherwise x"):
        write_untied(tmp_path / "x", base)
