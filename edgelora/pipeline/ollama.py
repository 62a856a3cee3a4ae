"""A model's own chat template in the language of ollama, held against what the model's own renders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import product

from edgelora.base.model import Base
from edgelora.data.encode import encode_conversation
from edgelora.data.go_template import FAMILIES, Family, go_template, render
from edgelora.data.rows import Message
from edgelora.errors import DataError, ExportError
from edgelora.pipeline.check_rows import DEFAULT_CHECK

Said = list[tuple[str, str]]


def ollama_template(base: Base, system: str | None = None) -> tuple[Family, str]:
    """The first family that renders what the model's own template renders, and its Go template.

    system: what ollama will say first (the Modelfile's SYSTEM) where a conversation has no system message of its own.
    Raises ExportError if none does: ollama would say something else to the model than it was trained on.
    """
    asked = _conversations(base, system)
    default = _default_system(base)
    for family, start in product(FAMILIES, ("", _bos(base))):
        if default is not None and "system" not in family.turns:
            continue
        template = go_template(family, default, start)
        if all(render(template, messages) == _without_bos(base, text) for messages, text in asked):
            return family, template
    raise ExportError(
        what=f"{base.path}: its chat template is not one that edgelora can write in Go's language for ollama",
        why=f"none of {', '.join(f.name for f in FAMILIES)} renders the same prompts, and in other ones the model "
        "would see what it was not trained on",
        fix="run it with llama-server, which reads the template inside the file: --for llama-server",
    )


def ends_of_turns(base: Base) -> list[str]:
    """The tokens that end a turn, as text. Raises ExportError if the built-in rows do not end in one of them."""
    tokenizer = base.tokenizer
    for row in DEFAULT_CHECK:
        example = encode_conversation(row, tokenizer, base.template)
        last = int(example.input_ids[example.loss_mask.nonzero()[0][-1]])
        if last not in tokenizer.eog_ids:
            raise ExportError(
                what=f"{base.path}: its turns end in {tokenizer.text_of(last)!r}, which ends no answer",
                why="the vocabulary does not name it as an end, so ollama would not stop there",
                fix="use a base model whose template ends a turn with its end-of-turn token",
            )
    return [tokenizer.text_of(end) for end in sorted(tokenizer.eog_ids)]


def _conversations(base: Base, system: str | None) -> list[tuple[Said, str]]:
    """Prompts of one and several turns as ollama has them, and what the model's template renders.

    Without a system message, with one where the template knows any, and with the one that was trained with.
    """
    first, second = DEFAULT_CHECK[0].messages[:2], DEFAULT_CHECK[1].messages[:1]
    plain = [row.messages[:1] for row in DEFAULT_CHECK] + [(*first, *second), (*first, *first, *second)]
    out = [_rendered(base, messages) for messages in plain]
    with suppress(DataError):  # a model that knows no system messages is asked without one
        out += [_rendered(base, (Message("system", "Answer in one sentence."), *messages)) for messages in plain]
    if system is not None:
        out += [_rendered(base, (Message("system", system), *messages)) for messages in plain]
    return out


def _rendered(base: Base, messages: Sequence[Message]) -> tuple[Said, str]:
    """ollama leaves out a system message that says nothing."""
    said = [(m.role, m.content or "") for m in messages if m.content or m.role != "system"]
    return said, base.template.render(messages, generation_prompt=True).text


def _default_system(base: Base) -> str | None:
    """What the template says where nobody says anything else: the text of the system turn that it adds by itself."""
    alone = _without_bos(base, base.template.render((Message("user", "x"),), generation_prompt=True).text)
    for family in FAMILIES:
        if "system" in family.turns:
            (before, after), user = family.turns["system"], family.turns["user"][0]
            opening, found, _ = alone.partition(f"{after}{user}x")
            if found and opening.startswith(before):
                return opening.removeprefix(before)
    return None


def _bos(base: Base) -> str:
    return base.tokenizer.text_of(base.tokenizer.bos_id) if base.tokenizer.bos_id is not None else ""


def _without_bos(base: Base, text: str) -> str:
    return text.removeprefix(_bos(base)) if base.tokenizer.add_bos else text
