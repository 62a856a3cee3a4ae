"""What a worker remembers from one child to the next: the adapters to load again, and what must not be asked again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgelora.errors import AdapterError, EdgeloraError, WorkerDied
from edgelora.files.contract import sha256_file
from runtime.quarantine import Blame, asking, loading, using
from runtime.service import AdapterInfo, Request
from runtime.worker_messages import Ask, Call, Fault, Result


@dataclass(frozen=True)
class _Held:
    """A loaded adapter, and with what arguments it was loaded."""

    info: AdapterInfo
    arguments: Mapping[str, Any]


class Record:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._lost: dict[str, EdgeloraError] = {}
        self._blame = Blame()

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """By name, in the order in which they were loaded."""
        with self._lock:
            return MappingProxyType({name: held.info for name, held in self._held.items()})

    def check_request(self, request: Request) -> None:
        """Raise Quarantined if it ended the child too often; for an adapter that could not be loaded again, why."""
        with self._lock:
            for name in request.adapters:
                if name in self._lost:
                    raise copy.copy(self._lost[name])
            if self._blame:
                self._blame.require_innocent(asking(request), "this request")
                for name in request.adapters.keys() & self._held.keys():
                    self._blame.require_innocent(using(self._held[name].info.digest), f"the adapter {name}")

    def check_file(self, path: Path) -> None:
        """Raise Quarantined if it ended the child too often."""
        with self._lock:
            suspicious = bool(self._blame)
        if suspicious and (digest := _digest(path)):
            with self._lock:
                self._blame.require_innocent(loading(digest), str(path))
                self._blame.require_innocent(using(digest), str(path))

    def answered(self, asked: Call | Ask, answer: Result | Fault) -> None:
        """The child has answered this, if only with an error, and lives."""
        with self._lock:
            if isinstance(asked, Ask):
                if self._blame:
                    self._blame.answered(asking(asked.request), *self._in_use(asked.request))
            elif isinstance(answer, Result):
                self._changed(asked, answer.value)

    def _changed(self, call: Call, value: Any) -> None:
        name = call.arguments["name"]
        self._lost.pop(name, None)
        self._held.pop(name, None)  # one that is loaded anew goes to the end
        if call.method == "load":
            self._held[name] = _Held(value, call.arguments)
            self._blame.answered(loading(value.digest))

    def died(self, asked: Sequence[Call | Ask]) -> None:
        """The child died while it was asked this. Whoever loads a file at that moment is to blame, nobody else."""
        files = {_digest(call.arguments["path"]) for call in asked if isinstance(call, Call) and call.method == "load"}
        requests = [ask.request for ask in asked if isinstance(ask, Ask)]
        with self._lock:
            if files:
                self._blame.died({loading(digest) for digest in files if digest})
            else:
                in_use = {key for request in requests for key in self._in_use(request)}
                self._blame.died({asking(request) for request in requests}, in_use)

    def _in_use(self, request: Request) -> list[str]:
        return [using(self._held[name].info.digest) for name in request.adapters if name in self._held]

    def load_again(self, ask: Callable[[Callable[[int], Call]], Any]) -> None:
        """Have a new child load what the last one had, in the same order. An adapter that cannot be is lost: whoever
        asks for it is told why. Raises WorkerDied if the child dies of one."""
        with self._lock:
            held = dict(self._held)
        for name, adapter in held.items():
            try:
                self._load_again(name, adapter, ask)
            except WorkerDied:
                with self._lock:
                    self._blame.died({loading(adapter.info.digest)})
                raise
            except EdgeloraError as e:
                with self._lock:
                    self._held.pop(name, None)
                    self._lost[name] = e

    def _load_again(self, name: str, adapter: _Held, ask: Callable[[Callable[[int], Call]], Any]) -> None:
        digest = adapter.info.digest
        with self._lock:
            for key in (loading(digest), using(digest)):
                self._blame.require_innocent(key, f"the adapter {name}")
        info = ask(lambda number: Call(number, "load", dict(adapter.arguments)))
        if info.digest != digest:
            ask(lambda number: Call(number, "unload", {"name": name}))
            raise AdapterError(
                what=f"the adapter {name} was lost when the process that holds the model ended",
                why=f"{info.path} is another file now than the one that was loaded",
                fix="load it again, if the new one is meant",
            )


def _digest(path: Path) -> str | None:
    """None for what is no file, or is gone."""
    try:
        return sha256_file(path) if path.is_file() else None
    except OSError:
        return None
