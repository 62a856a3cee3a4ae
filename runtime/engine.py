"""One base, many live adapters, the right one answering: what a chat, a command or a server calls from any thread.

Every call goes to one owner's thread (`owner.py`), which holds the contexts (`lanes.py`), decides who computes next
(`scheduler.py`) and what may be reused (`states.py`). Files are checked and prompts tokenized by whoever calls.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from gguf.constants import GGMLQuantizationType

from edgelora.base.model import Base, open_base
from edgelora.device import Choice
from edgelora.errors import ConfigError, EngineError
from edgelora.files.soft_prompt import MAX_REFERENCE_TOKENS
from runtime.adapters import Adapters
from runtime.answer import Answer, Limits
from runtime.binding import UBATCH_TOKENS, Context, Entry, KeyValues, Lora, Model, Placement, build
from runtime.lanes import Lane, Lanes
from runtime.owner import Owner, closed
from runtime.prefix import prepare
from runtime.preflight import Checked, preflight
from runtime.prompt import prompt_ids, require_limits, require_room
from runtime.sampling import Sampler
from runtime.scheduler import Scheduler
from runtime.service import AdapterInfo, EngineConfig, Request
from runtime.snapshot_files import SnapshotFolder
from runtime.soft_prompt import Head
from runtime.states import Snapshots, chain_of, cut
from runtime.stream import LiveStream
from runtime.threads import choose_threads

CONTEXT = 2048
CHUNK, CHUNK_ON_GPU = 64, 512
DEFAULTS = EngineConfig()
POLL_SECONDS = 0.005
_FLASH = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True)
class EngineStats:
    """What is held in memory at the moment, and who is in work."""

    running: int
    waiting: int
    contexts: int
    kv_bytes: int
    """Of all contexts together: reserved when they are opened."""
    snapshots: int
    snapshot_bytes: int
    adapter_bytes: int


class Engine:
    """A base open in llama.cpp; see `Engine.open`. Safe to call from several threads. Close it, or use `with`."""

    def __init__(self, base: Base, config: EngineConfig) -> None:
        """Raises ConfigError for settings that cannot be, EngineError where llama.cpp refuses the model or memory."""
        _ = base.file  # a checkpoint is refused here, with the command that makes a GGUF of it
        self.base, self.config = base, config
        self.context = config.context or min(CONTEXT, base.context)
        _require_possible(config, self.context, base)
        chunk = config.chunk or (CHUNK_ON_GPU if config.gpu_layers else CHUNK)
        self._limits = Limits(chunk, self.context, config.draft_tokens)
        self._encoding, self._opened = threading.Lock(), False
        self._owner = Owner(self._work, self._end)
        try:
            self._owner.call(self._start)
        except BaseException:
            self._owner.close()
            raise

    @classmethod
    def open(cls, base: Base | Path, config: EngineConfig = DEFAULTS) -> Engine:
        """Open a base, a GGUF file or what `open_base` made of one."""
        return cls(open_base(base) if isinstance(base, Path) else base, config)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- for all ----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.base.path.name

    @property
    def threads(self) -> Choice:
        return self._threads

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        return self._adapters.infos

    def load(self, name: str, path: Path, *, allow_unverified: bool = False) -> AdapterInfo:
        """Load the GGUF adapter at `path` as `name`, in place of an older one of that name.

        Answers that are in work keep what they were asked with. Raises AdapterError if it is damaged, or was trained
        on another base, or (unless allowed) does not say on which.
        """
        checked = preflight(path, self.base, allow_unverified=allow_unverified)
        info = AdapterInfo(
            name, checked.digest, path, checked.size_bytes, checked.system, checked.single_turn, checked.invocation
        )

        def load() -> None:
            self._adapters.add(info, lambda: self._content(checked))
            self.base = checked.base

        self._owner.call(load)
        return info

    def unload(self, name: str, *, wait_seconds: float = 0.0) -> None:
        """Forget the adapter `name` and free it. Raises EngineError if answers still need it after `wait_seconds`."""
        deadline = time.monotonic() + wait_seconds
        while not self._owner.call(lambda: self._adapters.remove(name)):
            if time.monotonic() >= deadline:
                raise EngineError(
                    what=f"{name} is in use",
                    why="an answer is being computed with it",
                    fix="wait for its end or cancel it",
                )
            time.sleep(POLL_SECONDS)

    def generate(self, request: Request) -> LiveStream:
        """Answer; the pieces come as they are computed. Raises at once for what can be known before."""
        require_limits(request.max_tokens)
        with self._encoding:
            prompt = prompt_ids(request.prompt, self.base, self.context)
        stream = LiveStream(lambda stream: self._owner.post(lambda: self._scheduler.cancel(stream)))
        self._owner.call(lambda: self._scheduler.submit(self._answer(request, prompt, stream)))
        return stream

    def stats(self) -> EngineStats:
        return self._owner.call(self._stats)

    def close(self) -> None:
        """Free everything. Answers in work end with EngineError."""
        self._owner.close()

    # -- the owner's ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        config = self.config
        with ExitStack() as opened:
            self._model = Model(self.base.path, placement=Placement(config.gpu_layers, config.mmap, config.mlock))
            opened.callback(self._model.close)
            self._snapshots = Snapshots(config.snapshot_bytes)
            self._adapters = Adapters(lambda digest: self._lanes.detach(digest))
            first = self._lane(config.threads or 1)
            opened.callback(first.context.close)
            asked = Choice(str(config.threads), "asked for") if config.threads else None
            self._threads = asked or choose_threads(first.context)
            self._token_bytes = _token_bytes(first.context)
            self._snapshots.archive = self._archive()
            opened.pop_all()
        self._lanes = Lanes(first, config.hot_adapters, lambda: self._lane(int(self.threads.value)))
        self._scheduler = Scheduler(self._lanes, self._adapters, config.conversations, self._token_bytes)
        self._opened = True

    def _lane(self, threads: int) -> Lane:
        return Lane(self._context(self.context, threads), self._adapters, self._snapshots, self._limits.chunk)

    def _context(self, room: int, threads: int) -> Context:
        config = self.config
        return Context(
            self._model, n_ctx=room, n_sequences=config.conversations, threads=threads,
            n_batch=max(self._limits.chunk, config.conversations * (1 + config.draft_tokens)),
            kept=KeyValues(GGMLQuantizationType[config.kv_type.upper()], _FLASH[config.flash_attention]),
        )  # fmt: skip

    def _content(self, checked: Checked) -> Lora | Head:
        """What was checked, as llama.cpp takes it; what stands before prompts is tried in a context of its own."""
        if checked.soft is None:
            return Lora(self._model, checked.path, checked.content)
        require_room(checked.soft.length, self.context)
        room = checked.soft.length + MAX_REFERENCE_TOKENS
        with closing(self._context(room, int(self.threads.value))) as context:
            return prepare(checked.soft, context, str(checked.path))

    def _archive(self) -> SnapshotFolder | None:
        """The folder of snapshots, if there is one: it needs to know all that the numbers depend on."""
        config, base = self.config, self.base
        if config.snapshot_folder is None:
            return None
        state = base.path.stat()
        identity = {
            "base": [base.fingerprint.short, base.quant, state.st_size, state.st_mtime_ns],
            "settings": [self._limits.chunk, config.kv_type, config.flash_attention, config.gpu_layers,
                         config.conversations > 1, self.threads.value],
            "llama.cpp": build(),
        }  # fmt: skip
        return SnapshotFolder(config.snapshot_folder, identity, config.snapshot_folder_bytes)

    def _work(self) -> bool:
        try:
            return self._opened and self._scheduler.step()
        except Exception as e:  # a fault of ours must not end the thread that everybody waits for
            self._scheduler.fail_all(EngineError("the engine failed", repr(e), "report this with what was asked"))
            return False

    def _answer(self, request: Request, prompt: list[int], stream: LiveStream) -> Answer:
        key = self._adapters.key_of(request.adapters)
        whole, limits = self._adapters.behind_head(prompt, key), self._limits
        require_room(len(whole), self.context)
        phases = self._adapters.phases(whole, key)
        parts = cut(whole, phases, limits.chunk)
        sampler = Sampler.of(self._model, request.sampling, n_ctx=self.context, prompt=prompt)
        return Answer(
            request, stream, self._model, sampler, limits, key, phases[-1][1], deque(parts),
            chain_of(parts, limits.chunk, b""),
        )  # fmt: skip

    def _stats(self) -> EngineStats:
        contexts = len(self._lanes.all)
        return EngineStats(
            running=self._scheduler.n_running, waiting=self._scheduler.n_waiting, contexts=contexts,
            kv_bytes=contexts * self.config.conversations * self.context * self._token_bytes,
            snapshots=len(self._snapshots), snapshot_bytes=self._snapshots.n_bytes,
            adapter_bytes=self._adapters.n_bytes,
        )  # fmt: skip

    def _end(self) -> None:
        if not self._opened:
            return  # opening failed and has freed what there was
        self._scheduler.fail_all(closed())
        if self._snapshots.archive is not None:
            self._lanes.keep_all()
            self._snapshots.close()
        self._lanes.close()
        self._adapters.close()
        self._model.close()


def _token_bytes(context: Context) -> int:
    """What one token's keys and values take."""
    sizes = []
    for position in range(2):
        context.decode([Entry(0, position, 0, True)])
        sizes.append(context.state_bytes(0))
    context.clear()
    return sizes[1] - sizes[0]


def _require_possible(config: EngineConfig, context: int, base: Base) -> None:
    faults = [
        f"{name} is {value}, from {least} to {most} can be"
        for name, value, least, most in (
            ("context", context, 2, base.context),
            ("conversations", config.conversations, 1, 256),
            ("chunk", CHUNK if config.chunk is None else config.chunk, 1, UBATCH_TOKENS),
            ("draft_tokens", config.draft_tokens, 0, 64),
            ("hot_adapters", config.hot_adapters, 0, 64),
            ("threads", config.threads or 1, 1, 512),
            ("gpu_layers", config.gpu_layers, -1, 10_000),
            ("snapshot_bytes", config.snapshot_bytes, 0, 1 << 50),
            ("snapshot_folder_bytes", config.snapshot_folder_bytes, 0, 1 << 50),
        )
        if not least <= value <= most
    ]
    if faults:
        raise ConfigError(
            what="; ".join(faults),
            why=f"{base.path.name} was trained on {base.context} tokens, and llama.cpp has limits of its own",
            fix="leave the setting out, or choose one in that range",
        )
