"""What limits an answer to a form: GBNF or a JSON schema, checked before llama.cpp's parser, which dies of some."""

from __future__ import annotations

from runtime.service import Sampling


def grammar_of(sampling: Sampling) -> str | None:
    """The grammar (GBNF) that `sampling` asks for."""
    return sampling.grammar
