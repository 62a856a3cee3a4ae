"""`edgelora inspect`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import Json
from edgelora.words import count, visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from edgelora.pipeline.inspect import BaseFacts, Origin, Shape, Weights
    from edgelora.pipeline.inspect_adapter import AdapterFacts
    from edgelora.pipeline.inspect_facts import Ability, TemplateFacts, TokenizerFacts

MOST_CHARACTERS, MOST_SAMPLE_LINES = 1000, 24
MOST_SPECIAL = 12
TRAINING = ("epochs", "steps", "learning_rate", "rank", "alpha", "batch_rows", "max_length", "seed", "seconds")


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
    groups = _base(facts) if isinstance(facts, BaseFacts) else _adapter(facts)
    for i, group in enumerate(filter(None, map(list, groups))):
        if i:
            table.add_row()
        before = None
        for label, value in group:
            table.add_row("" if label == before else label, value)
            before = label
    output().print(table)


# -- a base -------------------------------------------------------------------------------------------------------

# Label and value of each line; a label that repeats is shown once.
Rows = Iterator[tuple[str, "RenderableType"]]


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
    yield "name", _plain(facts.name)
    yield "path", _plain(facts.path)
    family = shape.model_type or shape.gguf_architecture or "of an unknown family"
    other = f" (in llama.cpp: {shape.gguf_architecture})" if shape.gguf_architecture not in (None, family) else ""
    yield "model", _plain(f"{family}{other}, {facts.kind}, {weights.quant}")
    if facts.fault is not None:
        yield "fault", _bad(facts.fault)
    yield from _weights(weights)


def _weights(w: Weights) -> Rows:
    from rich.table import Table

    number = f"{_si(w.parameters)} parameters, " if w.parameters is not None else ""
    files = f" in {w.files} files" if w.files > 1 else ""
    bits = f", {w.bits_per_weight:.2f} bits per weight" if w.bits_per_weight else ""
    yield "size", _plain(f"{number}{_bytes(w.size_bytes)}{files}{bits}")
    table = Table.grid(padding=(0, 2))
    total = sum(share.size_bytes for share in w.types) or 1
    for share in w.types:
        fell_back = ", ".join(f"{n} fell back ({columns} columns)" for columns, n in share.fell_back.items())
        table.add_row(
            share.type, count(share.tensors, "tensor"), f"{_si(share.parameters)}", f"{share.size_bytes / total:.1%}",
            _plain(fell_back),
        )  # fmt: skip
    for column in table.columns[1:4]:
        column.justify, column.no_wrap = "right", True
    if w.types:
        yield "weights", table
    if any(share.fell_back for share in w.types):
        yield "weights", _note(f"rows that do not divide into {w.quant}'s blocks of 256 fall back to other types")


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
            yield "shape", _plain(", ".join(filter(None, parts)))
    if "sliding_window" in d:
        layers = f" in {shape.sliding_layers} of {d['num_hidden_layers']} layers" if shape.sliding_layers else ""
        yield "window", _plain(f"{count(d['sliding_window'], 'token')}{layers}")
    if "max_position_embeddings" in d:
        yield "context", _plain(count(d["max_position_embeddings"], "token"))
    if shape.context_reason is not None and shape.context_in_llama_cpp is not None:
        yield "context", _note(f"{shape.context_in_llama_cpp:,} in llama.cpp: {shape.context_reason}")
    if shape.rope:
        yield "rope", _plain(", ".join(f"{key.replace('_', ' ')} {_value(v)}" for key, v in shape.rope.items()))


def _tokenizer(t: TokenizerFacts) -> Rows:
    kind = {"gpt2": "byte-level BPE", "llama": "SentencePiece"}.get(t.model, t.model)
    pre = "" if t.model == "llama" else f", pre-tokenizer {t.pre}"
    yield "tokenizer", _plain(f"{kind}{pre}, {count(t.size, 'token')}")
    if t.fault is not None:
        yield "tokenizer", _bad(t.fault)
        return
    for label, found in (("special", [(name, *token) for name, token in t.special.items()]),
                         ("ends", [("", *token) for token in t.ends])):  # fmt: skip
        shown = [f"{name} {text} {token}".strip() for name, token, text in found[:MOST_SPECIAL]]
        more = f", … {len(found) - MOST_SPECIAL} more" if len(found) > MOST_SPECIAL else ""
        yield label, _plain(", ".join(shown) + more if shown else "none")
    added = [name for name, is_so in (("BOS in front", t.add_bos), ("EOS at the end", t.add_eos)) if is_so]
    yield "added", _plain(" and ".join(added) or "neither BOS nor EOS")


def _template(t: TemplateFacts) -> Rows:
    from rich.text import Text

    if t.sha256 is None:
        yield "template", _bad(t.fault) if t.fault else _note("none")
        return
    takes = "takes a system message" if t.takes_system else "takes no system message"
    date = ", tells the date" if t.tells_the_date else ""
    rest = f", {takes}{date}" if t.fault is None else ""
    yield "template", _plain(f"{t.characters:,} characters, sha256 {t.sha256[:12]}{rest}")
    if t.sample is None:
        yield "template", _bad(t.fault or "")
        return
    lines = t.sample.removesuffix("\n").split("\n")
    for line in lines[:MOST_SAMPLE_LINES]:
        yield "sample", Text.assemble(("│ ", "dim"), _plain(line))
    if len(lines) > MOST_SAMPLE_LINES:
        yield "sample", _note(f"… {count(len(lines) - MOST_SAMPLE_LINES, 'more line')}; --json prints all")


def _origin(origin: Origin) -> Rows:
    if origin.fingerprint is not None:
        merged = f"{count(len(origin.lineage), 'merge')} in its weights" if origin.lineage else "nothing merged into it"
        yield "identity", _plain(f"{origin.fingerprint}, {merged}")
    if (known := origin.known) is not None:
        yield "known as", _plain(f"{known.name}, from {known.source}; {known.licence}")
    for fault in origin.faults:
        yield "identity", _bad(fault)
    if origin.contract is not None:
        yield from _contract(origin.contract)
    if origin.certificate_of_source:
        yield "certificate", _note("none of its own: this is that of the file it was made from, which has other types")
    if origin.certificate is not None:
        yield "certificate", _certificate(origin.certificate)


def _abilities(facts: BaseFacts) -> Rows:
    shown = (facts.fault, facts.tokenizer.fault, facts.template.fault, *facts.origin.faults)
    for label, ability in (("train", facts.train), ("run", facts.run)):
        yield label, _ability(ability, shown)
    if facts.linears:
        yield "adapters", _plain(f"attach to {_layers(facts.linears)}")


def _ability(ability: Ability, shown: Collection[str | None]) -> Text:
    """`shown`: the faults that stand above."""
    why = "see above" if ability.why in shown else ability.why
    text = f"{ability.answer}{': ' if why else ''}{why}"
    return {"yes": _good, "no": _bad}.get(ability.answer, _note)(text)


# -- an adapter ---------------------------------------------------------------------------------------------------


def _adapter(facts: AdapterFacts) -> Iterator[Rows]:
    yield _made_of(facts)
    yield _made_by(facts)
    yield ((label, _ability(getattr(facts, label), facts.faults)) for label in ("export", "merge", "chat"))


def _made_of(facts: AdapterFacts) -> Rows:
    yield "path", _plain(facts.path)
    for_family = f" for {facts.architecture}" if facts.architecture else ""
    yield "adapter", _plain(f"{facts.kind}{for_family}, {facts.method}")
    for fault in facts.faults:
        yield "fault", _bad(fault)
    types = ", ".join(share.type for share in facts.types)
    yield "size", _plain(f"{_si(facts.parameters)} parameters in {types or 'no tensors'}, {_bytes(facts.size_bytes)}")
    if facts.ranks:
        ranks = sorted(facts.ranks)
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        yield "rank", _plain(f"{span}{'' if facts.alpha is None else f', alpha {facts.alpha:g}'}")
    if facts.targets:
        yield "targets", _plain(_layers(facts.targets))


def _made_by(facts: AdapterFacts) -> Rows:
    if facts.contract is not None:
        yield from _contract(facts.contract)
    else:
        name = f"{facts.base}, by its own word" if facts.base else "it does not say which"
        yield "base", _note(f"{name}: it has no contract")
    if facts.certificate is not None:
        yield "certificate", _certificate(facts.certificate)


def _contract(contract: Mapping[str, Any]) -> Rows:
    base, training = contract["base"], contract["training"]
    yield "base", _plain(f"{base['name']}, {base['quant']}, identity {base['fingerprint']}")
    data = training.get("data")
    sources = [source for source in (data if isinstance(data, list) else [data]) if isinstance(source, dict)]
    if sources:
        listed = (f"{_value(source.get('rows'))} rows of {_value(source.get('name'))}" for source in sources)
        yield "data", _plain(", ".join(listed))
    if contract["system"] is not None:
        yield "system", _plain(contract["system"])
    shown = {key: training[key] for key in TRAINING if key in training}
    for label, values in (("training", shown), ("scores", contract["evaluation"])):
        flat = [f"{key.replace('_', ' ')} {_value(v)}" for key, v in values.items() if _is_scalar(v)]
        if flat:
            yield label, _plain(", ".join(flat))
    versions = ", ".join(f"{name} {v}" for name, v in contract["versions"].items())
    yield "made by", _plain(versions or f"edgelora {contract['version']}")


def _certificate(certificate: Mapping[str, Any]) -> Text:
    """Whatever a file says here was written by whoever made it."""
    # of an adapter; of a model, over its own weights; of a folder, which llama.cpp does not run
    compared = (certificate.get(name) for name in ("adapter", "fidelity", "loss"))
    numbers = next((found for found in compared if isinstance(found, dict)), {})
    parts = ["passed" if certificate.get("passed") is True else "not passed"]
    if isinstance(kl := numbers.get("kl_mean"), float):
        parts.append(f"mean KL {kl:.2g} (limit {_value(certificate.get('kl_limit'))})")
    if isinstance(same := numbers.get("same_top"), float):
        parts.append(f"same top {same:.1%}")
    if "n_tokens" in numbers:
        parts.append(f"on {_value(numbers['n_tokens'])} tokens")
    return _plain(f"says of itself: {', '.join(parts)}")


# -- words and numbers --------------------------------------------------------------------------------------------


def _plain(text: str) -> Text:
    """A line of what files say: cut where no person reads on, escaped where it would move the cursor."""
    from rich.text import Text

    text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
    return Text(text if text.isprintable() else visible(text))


def _good(text: str) -> Text:
    return _marked("✓ ", "green", text)


def _bad(text: str) -> Text:
    return _marked("✗ ", "red", text)


def _note(text: str) -> Text:
    return _marked("! ", "yellow", text)


def _marked(mark: str, style: str, text: str) -> Text:
    from rich.text import Text

    return Text.assemble((mark, style), _plain(text))


def _layers(found: Mapping[str, int]) -> str:
    """`210 linear layers: 30 × q_proj, k_proj`; only `layers` where norms, the embedding or the head are among them."""
    groups: dict[int, list[str]] = {}
    for name, n in found.items():
        groups.setdefault(n, []).append(name.rpartition(".")[2])
    parts = "; ".join(f"{n} × {', '.join(names)}" for n, names in groups.items())
    linear = "" if any(name.endswith(("norm", "embed_tokens", "lm_head")) for name in found) else "linear "
    return f"{count(sum(found.values()), f'{linear}layer')}: {parts}"


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _si(n: int) -> str:
    """`134.5 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
