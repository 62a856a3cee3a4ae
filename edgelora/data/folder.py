"""The chat template of an HF folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgelora.errors import BaseModelError
from edgelora.files.checkpoint import read_json

LARGEST_TEMPLATE = 1 << 20
LARGEST_CONFIG = 40 << 20  # old checkpoints list every added token in it; more could not be read in 256 MB


def folder_template(folder: Path) -> str | None:
    """The text of `chat_template.jinja`, or else of `chat_template` in tokenizer_config.json; None without either.

    Where a checkpoint names several templates, the one called `default`. Raises BaseModelError for anything else.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    config = folder / "tokenizer_config.json"
    found: Any = read_json(config, LARGEST_CONFIG).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        named = {t["name"]: t["template"] for t in found if isinstance(t, dict) and {"name", "template"} <= t.keys()}
        if "default" not in named:
            raise _fault(folder, f"it names the templates {', '.join(map(str, named)) or '(none)'} and no default")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise _fault(folder, "chat_template in tokenizer_config.json is no text")
    return found


def read_template(file: Path) -> str:
    """The text of a Jinja file. Raises BaseModelError for what cannot be one."""
    try:
        if file.stat().st_size > LARGEST_TEMPLATE:
            raise _fault(file, f"it is larger than {LARGEST_TEMPLATE >> 20} MB")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise _fault(file, f"it cannot be read ({e})") from e


def _fault(folder: Path, what: str) -> BaseModelError:
    return BaseModelError(
        what=f"{folder}: {what}",
        why="the chat template decides how a conversation looks to the model",
        fix="put the template's text into chat_template.jinja in that folder",
    )
