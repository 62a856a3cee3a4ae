"""Where a model is measured: in llama.cpp, which will run it, or in torch, for what llama.cpp cannot run or read."""

from __future__ import annotations

from pathlib import Path

from edgelora.base.model import Base, open_base
from edgelora.device import Choice
from edgelora.errors import ConfigError
from edgelora.files.adapter_check import contract_of
from edgelora.files.contract import contract_in
from edgelora.files.gguf import GGUFFile

AUTO, LLAMA_CPP, TORCH = "auto", "llama.cpp", "torch"


def choose_engine(asked: str, model: Path, adapter: Path | None) -> Choice:
    """`llama.cpp` for GGUF files, `torch` for a checkpoint or an adapter's folder. Raises ConfigError for what the
    engine asked for cannot read."""
    if asked not in (AUTO, LLAMA_CPP, TORCH):
        raise ConfigError(
            what=f"--in {asked}: there is nothing of that name to run a model in",
            why="figures are measured where the model runs",
            fix=f"choose one of {AUTO}, {LLAMA_CPP}, {TORCH}",
        )
    folders = [path for path in (model, adapter) if path is not None and path.is_dir()]
    if asked == LLAMA_CPP and folders:
        raise ConfigError(
            what=f"--in {LLAMA_CPP}: {folders[0]} is a folder",
            why="llama.cpp reads GGUF files alone",
            fix="write it as one with `edgelora convert` (a base) or `export` (an adapter), or pass --in torch",
        )
    if asked == TORCH and adapter is not None and not adapter.is_dir():
        raise ConfigError(
            what=f"--in {TORCH}: {adapter} is no folder",
            why="a GGUF adapter was written for llama.cpp; what it was exported from runs in torch",
            fix="pass the adapter's folder",
        )
    if asked != AUTO:
        return Choice(asked, "asked for")
    if folders:
        return Choice(
            TORCH, f"{folders[0].name} is a folder; what llama.cpp will make of it may differ in its roundings"
        )
    return Choice(LLAMA_CPP, "it will run there")


def as_trained(model: Path, adapter: Path | None) -> Base:
    """The model, with the template that its adapter (a GGUF or a folder) was trained with."""
    base = open_base(model)
    if adapter is None:
        return base
    return base.as_trained(contract_in(adapter) if adapter.is_dir() else contract_of(GGUFFile(adapter)))
