"""`edgelora inspect`, and what it shows of a base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import Json
from edgelora.cli.inspect_adapter import adapter_rows
from edgelora.cli.inspect_words import (
    Rows,
    ability_text,
    bad,
    certificate_text,
    contract_rows,
    layers_text,
    note,
    plain,
    si,
    value_text,
)
from edgelora.words import count, size

if TYPE_CHECKING:
    from edgelora.pipeline.inspect import BaseFacts, Origin
    from edgelora.pipeline.inspect_facts import TemplateFacts, TokenizerFacts
    from edgelora.pipeline.inspect_shape import Shape, Weights

MOST_SAMPLE_LINES, MOST_SPECIAL = 24, 12


def inspect(
    path: Annotated[Path, typer.Argument(help="A model or an adapter: a .gguf file, or a folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what is in a model or an adapter, and what can be done with it.

    Example: `edgelora inspect base.gguf`
    """
    from edgelora.pipeline.inspect import BaseFacts
    from edgelora.pipeline.inspect import inspect as run

    facts = run(path)
    if as_json:
        print(json.dumps(asdict(facts)))
        return
    from rich.table import Table

    from edgelora.cli.display import output

    table = Table.grid("label", "value", padding=(0, 2))
    table.columns[0].style, table.columns[0].no_wrap = "bold", True
    groups = _base(facts) if isinstance(facts, BaseFacts) else adapter_rows(facts)
    for i, group in enumerate(filter(None, map(list, groups))):
        if i:
            table.add_row()
        before = None
        for label, value in group:
            table.add_row("" if label == before else label, value)
            before = label
    output().print(table)


# -- a base -------------------------------------------------------------------------------------------------------


def _base(facts: BaseFacts) -> Iterator[Rows]:
    """Groups of lines, with an empty line between them."""
    yield _model(facts)
    yield _shape(facts.shape)
    yield _tokenizer(facts.tokenizer)
    yield _template(facts.template)
    yield _origin(facts.origin)
    yield _abilities(facts)


def _model(facts: BaseFacts) -> Rows:
    shape, weights = facts.shape, facts.weights
    yield "name", plain(facts.name)
    yield "path", plain(facts.path)
    family = shape.model_type or shape.gguf_architecture or "of an unknown family"
    other = f" (in llama.cpp: {shape.gguf_architecture})" if shape.gguf_architecture not in (None, family) else ""
    yield "model", plain(f"{family}{other}, {facts.kind}, {weights.quant}")
    if facts.fault is not None:
        yield "fault", bad(facts.fault)
    yield from _weights(weights)


def _weights(w: Weights) -> Rows:
    from rich.table import Table

    number = f"{si(w.parameters)} parameters, " if w.parameters is not None else ""
    files = f" in {w.files} files" if w.files > 1 else ""
    bits = f", {w.bits_per_weight:.2f} bits per weight" if w.bits_per_weight else ""
    yield "size", plain(f"{number}{size(w.size_bytes)}{files}{bits}")
    table = Table.grid(padding=(0, 2))
    total = sum(share.size_bytes for share in w.types) or 1
    for share in w.types:
        fell_back = ", ".join(f"{n} fell back ({columns} columns)" for columns, n in share.fell_back.items())
        table.add_row(
            share.type, count(share.tensors, "tensor"), si(share.parameters), f"{share.size_bytes / total:.1%}",
            plain(fell_back),
        )  # fmt: skip
    for column in table.columns[1:4]:
        column.justify, column.no_wrap = "right", True
    if w.types:
        yield "weights", table
    if any(share.fell_back for share in w.types):
        yield "weights", note(f"rows that do not divide into {w.quant}'s blocks of 256 fall back to other types")


def _shape(shape: Shape) -> Rows:
    d = shape.dimensions

    def named(text: str, key: str) -> str | None:
        return text.format(f"{d[key]:,}", "s" * (d[key] != 1)) if key in d else None

    lines = (
        (named("{} layer{}", "num_hidden_layers"), named("{} wide", "hidden_size"),
         named("feed-forward {}", "intermediate_size"), named("vocabulary {}", "vocab_size")),
        (named("{} head{}", "num_attention_heads"), named("{} key-value head{}", "num_key_value_heads"),
         named("{} wide", "head_dim")),
        (named("{} expert{}", "num_experts"), named("{} at a time", "num_experts_per_tok"),
         named("{} wide", "moe_intermediate_size")),
    )  # fmt: skip
    for parts in lines:
        if any(parts):
            yield "shape", plain(", ".join(filter(None, parts)))
    if "sliding_window" in d:
        layers = f" in {shape.sliding_layers} of {d['num_hidden_layers']} layers" if shape.sliding_layers else ""
        yield "window", plain(f"{count(d['sliding_window'], 'token')}{layers}")
    if "max_position_embeddings" in d:
        yield "context", plain(count(d["max_position_embeddings"], "token"))
    if shape.context_reason is not None and shape.context_in_llama_cpp is not None:
        yield "context", note(f"{shape.context_in_llama_cpp:,} in llama.cpp: {shape.context_reason}")
    if shape.rope:
        yield "rope", plain(", ".join(f"{key.replace('_', ' ')} {value_text(v)}" for key, v in shape.rope.items()))


def _tokenizer(t: TokenizerFacts) -> Rows:
    kind = {"gpt2": "byte-level BPE", "llama": "SentencePiece"}.get(t.model, t.model)
    pre = "" if t.model == "llama" else f", pre-tokenizer {t.pre}"
    yield "tokenizer", plain(f"{kind}{pre}, {count(t.size, 'token')}")
    if t.fault is not None:
        yield "tokenizer", bad(t.fault)
        return
    for label, found in (("special", [(name, *token) for name, token in t.special.items()]),
                         ("ends", [("", *token) for token in t.ends])):  # fmt: skip
        shown = [f"{name} {text} {token}".strip() for name, token, text in found[:MOST_SPECIAL]]
        more = f", … {len(found) - MOST_SPECIAL} more" if len(found) > MOST_SPECIAL else ""
        yield label, plain(", ".join(shown) + more if shown else "none")
    added = [name for name, is_so in (("BOS in front", t.add_bos), ("EOS at the end", t.add_eos)) if is_so]
    yield "added", plain(" and ".join(added) or "neither BOS nor EOS")


def _template(t: TemplateFacts) -> Rows:
    from rich.text import Text

    if t.sha256 is None:
        yield "template", bad(t.fault) if t.fault else note("none")
        return
    takes = "takes a system message" if t.takes_system else "takes no system message"
    date = ", tells the date" if t.tells_the_date else ""
    rest = f", {takes}{date}" if t.fault is None else ""
    yield "template", plain(f"{t.characters:,} characters, sha256 {t.sha256[:12]}{rest}")
    if t.sample is None:
        yield "template", bad(t.fault or "")
        return
    lines = t.sample.removesuffix("\n").split("\n")
    for line in lines[:MOST_SAMPLE_LINES]:
        yield "sample", Text.assemble(("│ ", "dim"), plain(line))
    if len(lines) > MOST_SAMPLE_LINES:
        yield "sample", note(f"… {count(len(lines) - MOST_SAMPLE_LINES, 'more line')}; --json prints all")


def _origin(origin: Origin) -> Rows:
    if origin.fingerprint is not None:
        merged = f"{count(len(origin.lineage), 'merge')} in its weights" if origin.lineage else "nothing merged into it"
        yield "identity", plain(f"{origin.fingerprint}, {merged}")
    if (known := origin.known) is not None:
        yield "known as", plain(f"{known.name}, from {known.source}; {known.licence}")
    for fault in origin.faults:
        yield "identity", bad(fault)
    if origin.contract is not None:
        yield from contract_rows(origin.contract)
    if origin.certificate_of_source:
        yield "certificate", note("none of its own: this is that of the file it was made from, which has other types")
    if origin.certificate is not None:
        yield "certificate", certificate_text(origin.certificate)


def _abilities(facts: BaseFacts) -> Rows:
    shown = (facts.fault, facts.tokenizer.fault, facts.template.fault, *facts.origin.faults)
    for label, ability in (("train", facts.train), ("run", facts.run)):
        yield label, ability_text(ability, shown)
    if facts.linears:
        yield "adapters", plain(f"attach to {layers_text(facts.linears)}")
