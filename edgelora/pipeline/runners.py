"""`--for`: what ollama, LM Studio and llama-server need beside a file. Known before the work, written after it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from edgelora.base.model import Base
from edgelora.data.encode import encode_conversation
from edgelora.data.go_template import FAMILIES, Family, go_template, render
from edgelora.data.rows import Message
from edgelora.errors import ConfigError, DataError, ExportError
from edgelora.files.atomic import refuse_existing, staged, write_text
from edgelora.pipeline.check_rows import DEFAULT_CHECK
from edgelora.pipeline.compare import Reference

PUBLISHER = "edgelora"  # LM Studio sorts models by who published them


@dataclass(frozen=True)
class Served:
    """A GGUF model (written, or to be) that `base` describes, and the GGUF adapter that is live over it."""

    base: Base
    model: Path
    adapter: Path | None = None

    @property
    def made(self) -> Path:
        """The file of the two that the command writes."""
        return self.adapter or self.model


@dataclass(frozen=True)
class Delivery:
    """Files by their text, files that are the model under another name, and what to type next."""

    texts: Mapping[Path, str]
    command: str
    notes: Sequence[str] = ()
    links: Mapping[Path, Path] = field(default_factory=dict)
    overwrite: bool = False

    def as_dict(self) -> dict[str, object]:
        return {"files": [str(path) for path in (*self.texts, *self.links)], "command": self.command}

    def write(self) -> None:
        """Write everything, each file in one step. Raises OutputError."""
        for path, text in self.texts.items():
            write_text(path, text, overwrite=self.overwrite)
        for path, model in self.links.items():
            with staged(path, overwrite=self.overwrite) as draft:
                try:
                    os.link(model, draft)
                except OSError:  # another disk, or one that knows no links
                    shutil.copyfile(model, draft)


def prepare(runner: str, served: Served, *, overwrite: bool = False) -> Delivery:
    """What `runner` needs, before anything is written.

    Raises ConfigError for a runner that is not known or cannot run this, ExportError for a chat template that it would
    render otherwise, OutputError for what stands in the way.
    """
    if runner not in RUNNERS:
        raise ConfigError(
            what=f"--for {runner}: no program of this name is known",
            why="each needs other files beside the model",
            fix=f"choose one of {', '.join(RUNNERS)}, or leave it out: a GGUF is all that llama.cpp needs",
        )
    if served.made.suffix != ".gguf":
        raise ConfigError(
            what=f"--for {runner}: {served.made} is not named as a GGUF file",
            why="these programs run GGUF files, and some know one by its name alone",
            fix="choose an --out that ends in .gguf",
        )
    delivery = RUNNERS[runner](served, overwrite)
    for path in (*delivery.texts, *delivery.links):
        refuse_existing(path, overwrite)
    return delivery


def prepare_for(runner: str | None, made_of: Reference, out: Path, *, live: bool, overwrite: bool) -> Delivery | None:
    """The same for what a command is about to write to `out`: an adapter `live` over its base, or a merged model.

    None where no runner was named.
    """
    if runner is None:
        return None
    base, _ = made_of.open()
    served = Served(base, base.file.path, out) if live else Served(base, out)
    return prepare(runner, served, overwrite=overwrite)


# -- ollama -------------------------------------------------------------------------------------------------------


def for_ollama(served: Served, overwrite: bool) -> Delivery:
    """A Modelfile. Its template is Go's, and renders what the model's own renders; its stops are the model's own."""
    base = served.base
    family, template = ollama_template(base)
    stops = ends_of_turns(base)
    path = served.made.with_name(f"{served.made.stem}.Modelfile")
    for text in (template, *stops, str(served.model)):
        if '"""' in text or (text in stops and ('"' in text or "\n" in text)):
            raise ExportError(
                what=f"{text!r} cannot be written into a Modelfile",
                why="it holds the quotation marks that end a text there",
                fix="run the file with llama-server, which reads the template inside it: --for llama-server",
            )
    lines = [f"FROM {_seen_from(path.parent, served.model)}"]
    if served.adapter is not None:
        lines.append(f"ADAPTER {_seen_from(path.parent, served.adapter)}")
    lines += [f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    name = shlex.quote(served.made.stem.lower())
    return Delivery(
        {path: "\n".join(lines) + "\n"},
        f"ollama create {name} -f {shlex.quote(str(path))} && ollama run {name}",
        [f"the template is {family.name}'s in Go's language: it renders what the model's own renders, as was checked"],
        overwrite=overwrite,
    )


def ollama_template(base: Base) -> tuple[Family, str]:
    """The first family that renders what the model's own template renders, and its Go template.

    Raises ExportError if none does: ollama would say something else to the model than it was trained on.
    """
    asked = _conversations(base)
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


Said = list[tuple[str, str]]


def _conversations(base: Base) -> list[tuple[Said, str]]:
    """Prompts of one and several turns, with a system message where the template knows one, and what it renders."""
    first, second = DEFAULT_CHECK[0].messages[:2], DEFAULT_CHECK[1].messages[:1]
    system = (Message("system", "Answer in one sentence."),)
    plain = [row.messages[:1] for row in DEFAULT_CHECK] + [(*first, *second), (*first, *first, *second)]
    with_system = [(*system, *messages) for messages in plain]
    out = []
    for messages in [*plain, *with_system]:
        try:
            text = base.template.render(messages, generation_prompt=True).text
        except DataError:
            if messages in with_system:  # this model knows no system messages: it is asked without one
                continue
            raise
        out.append(([(m.role, m.content or "") for m in messages], text))
    return out


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


def _seen_from(folder: Path, path: Path) -> str:
    """A path as a Modelfile takes it: relative where the file lies beside it, so that both can be moved together."""
    same = path.absolute().parent == folder.absolute()
    return f"./{path.name}" if same else str(path.absolute())


# -- LM Studio ----------------------------------------------------------------------------------------------------


def for_lmstudio(served: Served, overwrite: bool) -> Delivery:
    """publisher/model/file.gguf, as LM Studio looks for models: a link to the file, or a copy on another disk."""
    if served.adapter is not None:
        raise ConfigError(
            what=f"--for lmstudio: {served.adapter} is an adapter",
            why="LM Studio loads whole models only",
            fix="merge it: `edgelora merge BASE --adapter FOLDER --to Q4_K_M --out FILE --for lmstudio`",
        )
    model = served.model
    place = model.parent / PUBLISHER / model.stem / model.name
    return Delivery(
        {},
        f"lms import --user-repo {shlex.quote(f'{PUBLISHER}/{model.stem}')} --copy {shlex.quote(str(model))}",
        [f"or move the folder {place.parents[1]} into ~/.lmstudio/models"],
        {place: model},
        overwrite,
    )


# -- llama-server -------------------------------------------------------------------------------------------------


def for_llama_server(served: Served, overwrite: bool) -> Delivery:
    """The command line, also as a script; a template that the file does not hold goes with it."""
    base, words, texts = served.base, ["llama-server", "-m", str(served.model.absolute())], {}
    if served.adapter is not None:
        words += ["--lora-scaled", f"{_plain(served.adapter.absolute())}:1.0"]
        if base.own_template is None and base.chosen_template is not None:
            jinja = served.adapter.with_name(f"{served.adapter.stem}.jinja")
            texts[jinja] = base.chosen_template
            words += ["--jinja", "--chat-template-file", str(jinja.absolute())]
    words += ["-c", str(base.context)]
    command = shlex.join(words)
    texts[served.made.with_name(f"{served.made.stem}.llama-server.sh")] = f'#!/bin/sh\nexec {command} "$@"\n'
    return Delivery(texts, command, overwrite=overwrite)


def _plain(path: Path) -> str:
    """llama-server cuts a list of adapters at commas, and one of them at the colon before its scale."""
    if any(sign in str(path) for sign in ',:"'):
        raise ConfigError(
            what=f"{path}: llama-server cannot be given an adapter of this name",
            why="it takes commas, colons and quotation marks for something else",
            fix="choose another --out",
        )
    return str(path)


RUNNERS: dict[str, Callable[[Served, bool], Delivery]] = {
    "ollama": for_ollama,
    "lmstudio": for_lmstudio,
    "llama-server": for_llama_server,
}
