"""Lines of `edgelora inspect` that models and adapters have alike: what their files say, in words and numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgelora.words import count, visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from edgelora.pipeline.inspect_facts import Ability

MOST_CHARACTERS = 1000
TRAINING = ("epochs", "steps", "learning_rate", "rank", "alpha", "batch_rows", "max_length", "seed", "seconds")

# Label and value of each line; a label that repeats is shown once.
Rows = Iterator[tuple[str, "RenderableType"]]


def contract_rows(contract: Mapping[str, Any]) -> Rows:
    """Which base, data and settings it was made with."""
    base, training = contract["base"], contract["training"]
    yield "base", plain(f"{base['name']}, {base['quant']}, identity {base['fingerprint']}")
    data = training.get("data")
    sources = [source for source in (data if isinstance(data, list) else [data]) if isinstance(source, dict)]
    if sources:
        listed = (f"{value_text(source.get('rows'))} rows of {value_text(source.get('name'))}" for source in sources)
        yield "data", plain(", ".join(listed))
    if contract["system"] is not None:
        yield "system", plain(contract["system"])
    shown = {key: training[key] for key in TRAINING if key in training}
    for label, values in (("training", shown), ("scores", contract["evaluation"])):
        flat = [f"{key.replace('_', ' ')} {value_text(v)}" for key, v in values.items() if _is_scalar(v)]
        if flat:
            yield label, plain(", ".join(flat))
    versions = ", ".join(f"{name} {v}" for name, v in contract["versions"].items())
    yield "made by", plain(versions or f"edgelora {contract['version']}")


def certificate_text(certificate: Mapping[str, Any]) -> Text:
    """Whatever a file says here was written by whoever made it."""
    # of an adapter; of a model, over its own weights; of a folder, which llama.cpp does not run
    compared = (certificate.get(name) for name in ("adapter", "fidelity", "loss"))
    numbers = next((found for found in compared if isinstance(found, dict)), {})
    parts = ["passed" if certificate.get("passed") is True else "not passed"]
    if isinstance(kl := numbers.get("kl_mean"), float):
        parts.append(f"mean KL {kl:.2g} (limit {value_text(certificate.get('kl_limit'))})")
    if isinstance(same := numbers.get("same_top"), float):
        parts.append(f"same top {same:.1%}")
    if "n_tokens" in numbers:
        parts.append(f"on {value_text(numbers['n_tokens'])} tokens")
    return plain(f"says of itself: {', '.join(parts)}")


def ability_text(ability: Ability, shown: Collection[str | None]) -> Text:
    """`shown`: the faults that stand above."""
    why = "see above" if ability.why in shown else ability.why
    text = f"{ability.answer}{': ' if why else ''}{why}"
    return {"yes": good, "no": bad}.get(ability.answer, note)(text)


def plain(text: str) -> Text:
    """A line of what files say: cut where no person reads on, escaped where it would move the cursor."""
    from rich.text import Text

    text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
    return Text(text if text.isprintable() else visible(text))


def good(text: str) -> Text:
    """A line with a green tick."""
    return _marked("✓ ", "green", text)


def bad(text: str) -> Text:
    """A line with a red cross."""
    return _marked("✗ ", "red", text)


def note(text: str) -> Text:
    """A line with a yellow mark."""
    return _marked("! ", "yellow", text)


def _marked(mark: str, style: str, text: str) -> Text:
    from rich.text import Text

    return Text.assemble((mark, style), plain(text))


def layers_text(found: Mapping[str, int]) -> str:
    """`210 linear layers: 30 × q_proj, k_proj`; only `layers` where norms, the embedding or the head are among them."""
    groups: dict[int, list[str]] = {}
    for name, n in found.items():
        groups.setdefault(n, []).append(name.rpartition(".")[2])
    parts = "; ".join(f"{n} × {', '.join(names)}" for n, names in groups.items())
    linear = "" if any(name.endswith(("norm", "embed_tokens", "lm_head")) for name in found) else "linear "
    return f"{count(sum(found.values()), f'{linear}layer')}: {parts}"


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float)


def value_text(value: object) -> str:
    """A value of a file's metadata: `yes`, `8,192`, `1e-05`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def si(n: int) -> str:
    """`134.5 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
