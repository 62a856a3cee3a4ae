"""`--for`: what ollama, LM Studio and llama-server need beside a file. Known before the work, written after it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgelora.base.model import Base
from edgelora.errors import ConfigError, ExportError
from edgelora.files.atomic import refuse_existing, staged, write_text
from edgelora.files.contract import Contract
from edgelora.peft.soft_prompt import is_trained_prompt
from edgelora.pipeline.ollama import ends_of_turns, ollama_template
from edgelora.pipeline.torch_states import Reference

MOST_CONTEXT = 8192  # tokens: llama-server keeps room for all of them, and a trained context may be 131072
PUBLISHER = "edgelora"  # LM Studio sorts models by who published them


@dataclass(frozen=True)
class Served:
    """A GGUF model (written, or to be) that `base` describes, and the GGUF adapter that is live over it.

    contracts: of the adapters that are merged into it, or live.
    """

    base: Base
    model: Path
    adapter: Path | None = None
    contracts: Sequence[Contract] = ()
    waits: bool = False
    """Whether the adapter acts from an invocation on (aLoRA)."""

    @property
    def made(self) -> Path:
        """The file of the two that the command writes."""
        return self.adapter or self.model

    @property
    def system(self) -> str | None:
        """The system message that the adapters were trained with, as `edgelora chat` says it: None if they differ."""
        said = {contract.system for contract in self.contracts}
        return said.pop() if len(said) == 1 else None

    @property
    def notes(self) -> list[str]:
        """What these programs do not do by themselves."""
        notes = []
        if self.system is None and any(contract.system is not None for contract in self.contracts):
            notes.append("its adapters were trained with different system messages, so none is said")
        if self.contracts and all(contract.single_turn for contract in self.contracts):
            notes.append("it was trained on single questions: ask each one in a conversation of its own")
        return notes


@dataclass(frozen=True)
class Delivery:
    """Files by their text, files that are the model under another name, and what to type next."""

    texts: Mapping[Path, str]
    command: str
    notes: Sequence[str] = ()
    """What its user should know."""
    links: Mapping[Path, Path] = field(default_factory=dict)
    overwrite: bool = False

    def as_dict(self) -> dict[str, object]:
        return {
            "files": [str(path) for path in (*self.texts, *self.links)],
            "command": self.command,
            "notes": self.notes,
        }

    def write(self) -> None:
        """Write everything, each file in one step. Raises OutputError."""
        for path, text in self.texts.items():
            write_text(path, text, overwrite=self.overwrite)
            if path.suffix == ".sh":
                mode = path.stat().st_mode
                path.chmod(mode | (mode & 0o444) >> 2)  # who may read it may run it
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
    for path, _ in made_of.adapters:
        if live and is_trained_prompt(path):
            raise ConfigError(
                what=f"--for {runner}: {path} stands before prompts",
                why="edgelora's own engine puts it there, and no other program does",
                fix="leave --for out: `edgelora chat` and `edgelora generate` take the file",
            )
    base, adapters = made_of.open()
    contracts = tuple(a.contract for a, scale in adapters if scale and a.contract is not None)
    waits = any(adapter.invocation for adapter, _ in adapters)
    served = Served(base, base.file.path, out, contracts, waits) if live else Served(base, out, contracts=contracts)
    return prepare(runner, served, overwrite=overwrite)


# -- ollama -------------------------------------------------------------------------------------------------------


def for_ollama(served: Served, overwrite: bool) -> Delivery:
    """A Modelfile. Its template is Go's, and renders what the model's own renders; its stops are the model's own.

    What it says first is the system message of the training.
    """
    base, system = served.base, served.system
    if served.waits:
        raise ConfigError(
            what=f"--for ollama: {served.adapter} waits for its invocation",
            why="llama-server looks for that in each prompt, and not every ollama runs that; others act on all tokens",
            fix="pass --for llama-server",
        )
    family, template = ollama_template(base, system)
    stops = ends_of_turns(base)
    path = served.made.with_name(f"{served.made.stem}.Modelfile")
    for text in (template, system or "", *stops, str(served.model)):
        if '"""' in text or (text in stops and ('"' in text or "\n" in text)):
            raise ExportError(
                what=f"{text!r} cannot be written into a Modelfile",
                why="it holds the quotation marks that end a text there",
                fix="run the file with llama-server, which reads the template inside it: --for llama-server",
            )
    lines = [f"FROM {_seen_from(path.parent, served.model)}"]
    if served.adapter is not None:
        lines.append(f"ADAPTER {_seen_from(path.parent, served.adapter)}")
    lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    name = shlex.quote(served.made.stem.lower())
    return Delivery(
        {path: "\n".join(lines) + "\n"},
        f"ollama create {name} -f {shlex.quote(str(path))} && ollama run {name}",
        [
            f"the template is {family.name}'s in Go's language: it renders what the model's own does, as was checked",
            *served.notes,
        ],
        overwrite=overwrite,
    )


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
        [f"or move the folder {place.parents[1]} into ~/.lmstudio/models", *_said_first(served), *served.notes],
        {place: model},
        overwrite,
    )


# -- llama-server -------------------------------------------------------------------------------------------------


def for_llama_server(served: Served, overwrite: bool) -> Delivery:
    """The command line, also as a script; a template that the file does not hold goes with it."""
    base, words, texts = served.base, ["llama-server", "-m", str(served.model.absolute())], {}
    if served.adapter is not None:
        # its store of old prompts forgets at which scale an adapter was, and gives one scale's states to another
        words += ["--lora-scaled", f"{_plain(served.adapter.absolute())}:1.0", "--cache-ram", "0"]
        if base.own_template is None and base.chosen_template is not None:
            jinja = served.adapter.with_name(f"{served.adapter.stem}.jinja")
            texts[jinja] = base.chosen_template
            words += ["--jinja", "--chat-template-file", str(jinja.absolute())]
    words += ["-c", str(min(base.context, MOST_CONTEXT))]
    command, notes = shlex.join(words), [*_said_first(served), *served.notes]
    script = ["#!/bin/sh", *(f"# {note}" for note in notes), f'exec {command} "$@"']
    texts[served.made.with_name(f"{served.made.stem}.llama-server.sh")] = "\n".join(script) + "\n"
    return Delivery(texts, command, notes, overwrite=overwrite)


def _said_first(served: Served) -> list[str]:
    """What to send a program that keeps no system message of its own, in one line of JSON."""
    if served.system is None:
        return []
    first = json.dumps({"role": "system", "content": served.system}, ensure_ascii=False)
    return [f"it was trained with a system message: begin every conversation with {first}"]


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
