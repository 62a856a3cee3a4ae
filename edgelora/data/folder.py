"""The chat template of an HF folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgelora.errors import BaseModelError
from edgelora.files.checkpoint import read_json

LARGEST_TEMPLATE = 1 << 20
WHERE_IT_BELONGS = "put the template's text into chat_template.jinja in that folder"
LARGEST_CONFIG = 40 << 20  # old checkpoints list every added token in it; more could not be read in 256 MB


def folder_template(folder: Path) -> str | None:
    """The text of `chat_template.jinja`, or else of `chat_template` in tokenizer_config.json; None without either.

    Where a checkpoint names several templates, the one called `default`. Raises BaseModelError for anything else.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file, fix=WHERE_IT_BELONGS)
    config = folder / "tokenizer_config.json"
    found: Any = read_json(config, LARGEST_CONFIG).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        named = {t["name"]: t["template"] for t in found if isinstance(t, dict) and {"name", "template"} <= t.keys()}
        if "default" not in named:
            listed = ", ".join(map(str, named)) or "(none)"
            raise _fault(folder, f"it names the templates {listed} and no default", WHERE_IT_BELONGS)
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise _fault(folder, "chat_template in tokenizer_config.json is no text", WHERE_IT_BELONGS)
    return found


def read_template(file: Path, *, fix: str = "pass the path of a Jinja file, or chatml") -> str:
    """The text of a Jinja file. Raises BaseModelError, with this fix, for what cannot be one."""
    try:
        with file.open(encoding="utf-8") as f:
            text = f.read(LARGEST_TEMPLATE + 1)
    except OSError as e:
        raise _fault(file, f"the chat template cannot be read ({e.strerror})", fix) from e
    except UnicodeDecodeError as e:
        raise _fault(file, "the chat template cannot be read (it is no text in UTF-8)", fix) from e
    if len(text) > LARGEST_TEMPLATE:
        raise _fault(file, f"longer than {LARGEST_TEMPLATE >> 20} MB, which no chat template is", fix)
    return text


def _fault(path: Path, what: str, fix: str) -> BaseModelError:
    return BaseModelError(
        what=f"{path}: {what}", why="the chat template decides how a conversation looks to the model", fix=fix
    )
