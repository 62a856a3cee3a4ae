"""Arguments that `chat` and `generate` share: adapters with names and scales, how tokens are drawn, how a base is held.

An option that is not given is left to the defaults of `runtime.service`, so that they stand in one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgelora.cli.arguments import named, scaled
from edgelora.errors import ConfigError

if TYPE_CHECKING:
    from edgelora.pipeline.live import Attached
    from runtime.service import EngineConfig, Sampling

Attach = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", help="A GGUF adapter: NAME=FILE[:SCALE], or one of the store by its name; repeatable.",
        show_default=False,
    ),
]  # fmt: skip
Worker = Annotated[
    bool, typer.Option("--worker", help="Run the model in a process of its own, which may die without this one.")
]
# THE TABLE of sampling options: a field of Sampling, its type here, its help
SAMPLING: dict[str, tuple[Any, str]] = {
    "temperature": (float, "0 always takes the likeliest token, which is the default."),
    "top_k": (int, "Draw from the k likeliest tokens; 0: from all."),
    "top_p": (float, "Draw from the likeliest tokens that make up this probability."),
    "min_p": (float, "Draw from tokens at least this share as likely as the likeliest."),
    "repeat_penalty": (float, "Divides the logits of tokens that were said; 1: off."),
    "presence_penalty": (float, "Taken off the logit of a token that was said."),
    "frequency_penalty": (float, "Taken off for each time that it was said."),
    "penalty_last_n": (int, "How many tokens back the penalties look; -1: all."),
    "dry_multiplier": (float, "Strength of DRY, which penalizes repeated sequences; 0: off."),
    "dry_base": (float, "How fast DRY grows with a sequence's length."),
    "dry_allowed_length": (int, "The longest sequence that DRY lets repeat."),
    "dry_penalty_last_n": (int, "How many tokens back DRY looks; -1: all."),
    "xtc_probability": (float, "How often XTC leaves out the likeliest tokens; 0: never."),
    "xtc_threshold": (float, "The probability that these tokens have at least."),
    "mirostat": (int, "Mirostat 1 or 2 keeps the surprise of tokens even; 0: off."),
    "mirostat_tau": (float, "The surprise it aims at."),
    "mirostat_eta": (float, "How fast it learns."),
    "seed": (int, "Of what is drawn."),
    "logit_bias": (list[str], "TOKEN=NUMBER, added to the logit of a token id; repeatable."),
    "stop": (list[str], "A text that ends the answer and is not part of it; repeatable."),
    "grammar": (Path, "A file with a grammar (GBNF) that the answer keeps to."),
    "json_schema": (Path, "A file with a JSON schema that the answer keeps to."),
}
# THE TABLE of engine options: the same for EngineConfig
ENGINE: dict[str, tuple[Any, str]] = {
    "context": (int, "Room for the conversation, in tokens; 2048, or what the base has."),
    "threads": (int, "Of the CPU; measured without it."),
    "gpu_layers": (int, "Layers held on a GPU; -1: all."),
    "flash_attention": (Literal["auto", "on", "off"], "Attention in tiles; default: auto."),
    "kv_type": (Literal["f32", "f16", "q8_0", "q4_0"], "Numbers of the KV cache; default: f16."),
    "mmap": (bool, "Map the file into memory; --no-mmap reads it."),
    "mlock": (bool, "Keep it from being swapped out."),
    "draft_tokens": (int, "Guess so many tokens ahead from the prompt itself; 0: none."),
}


def with_runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose last parameter is `**options` an option for each row of both tables; None: not given."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        _parameter(name, kind, text, panel)
        for panel, table in (("Sampling", SAMPLING), ("Model", ENGINE))
        for name, (kind, text) in table.items()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
    return command


def _parameter(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    typed = name.replace("_", "-")
    names = f"--{typed}/--no-{typed}" if kind is bool else f"--{typed}"
    option = typer.Option(names, help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Sampling as these options say. Raises ConfigError for what cannot be."""
    from runtime.service import Sampling
    from runtime.settings import checked, read_grammar, read_schema

    given = {name: options[name] for name in SAMPLING if options[name] not in (None, [])}
    convert: dict[str, Callable[[Any], Any]] = {
        "logit_bias": _biases, "stop": tuple, "grammar": read_grammar, "json_schema": read_schema,
    }  # fmt: skip
    return checked(Sampling(**{name: convert.get(name, _same)(value) for name, value in given.items()}))


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """How the base is held, as these options say."""
    from runtime.service import EngineConfig

    return EngineConfig(**{name: options[name] for name in ENGINE if options[name] is not None})


def attached(texts: Sequence[str] | None) -> list[Attached]:
    """What --adapter was given, in order. Raises ConfigError, also for two of one name."""
    adapters = [_attached(text) for text in texts or ()]
    names = [one.name for one in adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            what=f"two adapters named {twice[0]}",
            why="an adapter is switched on and off by its name",
            fix="write --adapter NAME=FILE with another name for one of them",
        )
    return adapters


def _attached(text: str) -> Attached:
    """`home=home.gguf:0.7`; without a name the file's own, without a scale 1."""
    from edgelora.pipeline.live import Attached
    from runtime.names import require_name

    name, equals, rest = text.partition("=")
    if not equals or Path(text).is_file():
        name, equals, rest = "", "", text
    path, scale = (Path(rest), 1.0) if Path(rest).is_file() else scaled(rest)
    _refuse_training(path)
    name, path = named(f"{name}{equals}{path}")
    return Attached(require_name(name), path, scale)


def _refuse_training(path: Path) -> None:
    if not (path / "adapter_config.json").is_file():
        return
    from edgelora.invocation import command

    raise ConfigError(
        what=f"--adapter {path}: this is a training folder",
        why="torch computes with what is in it; chat and generate run the GGUF that is made of it",
        fix=command("export", "BASE", path, "--out", Path(f"{path}.gguf")) + ", and pass that file",
    )


def _biases(words: list[str]) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, _, bias in (word.partition("=") for word in words)}
    except ValueError as e:
        raise ConfigError(
            what=f"--logit-bias {' '.join(words)}",
            why="it is TOKEN=NUMBER, of a token's id",
            fix="--logit-bias 12=-1.5",
        ) from e


def _same(value: Any) -> Any:
    return value
