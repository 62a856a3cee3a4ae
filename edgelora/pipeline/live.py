"""A running model with its adapters, for `edgelora chat` and `edgelora generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgelora.base.model import open_base
from edgelora.home import models_folder
from runtime.service import EngineConfig, Service
from runtime.store import Store


@dataclass(frozen=True)
class Attached:
    """An adapter to load: under which name, from which file (or name in the store), at which scale it answers."""

    name: str
    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Serving:
    """What to open, and how."""

    base: Path
    adapters: Sequence[Attached]
    config: EngineConfig
    allow_unverified: bool = False
    in_worker: bool = False
    """In a process of its own."""
    conversing: bool = True
    """Whether a chat template is needed."""


def history_file() -> Path:
    """Where what was typed in chats is kept."""
    return models_folder() / "chat-history"


@contextmanager
def serving(asked: Serving) -> Iterator[Service]:
    """The base with its adapters loaded; closed behind the block.

    Refused before it is loaded (BaseModelError): a checkpoint, which is no GGUF yet, and a base without a chat template
    that no adapter can bring either.
    """
    opened, store = open_base(asked.base), Store()
    _ = opened.file
    paths = [store.resolve(str(one.path)) for one in asked.adapters]
    if asked.conversing and not asked.adapters:
        _ = opened.template
    service: Service
    if asked.in_worker:
        from runtime.worker import Worker

        service = Worker.open(asked.base, asked.config)
    else:
        from runtime.engine import Engine

        service = Engine.open(opened, asked.config)
    with closing(service):
        for one, path in zip(asked.adapters, paths, strict=True):
            service.load(one.name, path, allow_unverified=asked.allow_unverified)
        yield service
