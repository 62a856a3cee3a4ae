"""The engine in a child process that may die: of a file that makes llama.cpp abort, for want of memory, by any signal.

What was in flight gets a typed error, the child is started again with the adapters it had, and what ended it twice is
refused from then on. This process never loads llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from edgelora.device import Choice
from runtime.service import AdapterInfo, EngineConfig, Request, Service
from runtime.supervise import Patience, Supervisor
from runtime.worker_messages import Ask, Call, Factory, Open
from runtime.worker_record import Record
from runtime.worker_stream import WINDOW, WorkerStream


def open_engine(base: Path, config: EngineConfig) -> Service:
    """What the child opens unless told otherwise."""
    from runtime.engine import Engine  # in the child alone: it loads llama.cpp

    return Engine.open(base, config)


class Worker:
    """A Service whose engine lives in a child. Safe to call from several threads; a call waits while it is restarted.

    Beside what the engine raises, any call may raise WorkerDied, and Quarantined for what has ended the child twice.
    """

    def __init__(self, record: Record, supervisor: Supervisor) -> None:
        self._record, self._supervisor = record, supervisor

    @classmethod
    def open(
        cls, base: Path, config: EngineConfig | None = None, *,
        factory: Factory = open_engine, patience: Patience | None = None,
    ) -> Worker:  # fmt: skip
        """Start a child that opens `base`. Raises what its engine raises, or WorkerDied; it is not tried again."""
        config = config or EngineConfig()
        record = Record()
        supervisor = Supervisor(lambda n: Open(n, factory, base, config), record, patience or Patience())
        worker = cls(record, supervisor)
        try:
            supervisor.ready()
        except BaseException:
            worker.close()
            raise
        return worker

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child. Streams that are still read get an EngineError, and so does any later call."""
        self._supervisor.close()

    @property
    def name(self) -> str:
        return self._supervisor.ready().name

    @property
    def threads(self) -> Choice:
        return self._supervisor.ready().threads

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        return self._record.adapters

    def load(self, name: str, path: Path, *, allow_unverified: bool = False) -> AdapterInfo:
        self._record.check_file(path)
        arguments = {"name": name, "path": path, "allow_unverified": allow_unverified}
        info: AdapterInfo = self._supervisor.ask(lambda n: Call(n, "load", arguments)).result()
        return info

    def unload(self, name: str, *, wait_seconds: float = 0.0) -> None:
        arguments = {"name": name, "wait_seconds": wait_seconds}
        self._supervisor.ask(lambda n: Call(n, "unload", arguments)).result()

    def generate(self, request: Request) -> WorkerStream:
        self._record.check_request(request)
        pending = self._supervisor.ask(lambda n: Ask(n, request, WINDOW))
        stream = WorkerStream(pending, self._supervisor.tell)  # from here on, whatever happens to it cancels
        pending.take()  # Accepted, or the error
        return stream
