"""Loaded adapters: addressed by name, held by content. Nothing is freed while an answer is computed with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.errors import EngineError
from runtime.binding import Lora
from runtime.names import require_scale, unknown_adapter
from runtime.service import AdapterInfo
from runtime.soft_prompt import Head
from runtime.states import NO_TOKEN, Key


@dataclass
class _Held:
    """A content in memory: how many names it has, and how many answers are computed with it."""

    content: Lora | Head
    invocation: tuple[int, ...]
    names: int = 0
    uses: int = 0

    @property
    def head(self) -> Head | None:
        return None if isinstance(self.content, Lora) else self.content

    def close(self) -> None:
        if isinstance(self.content, Lora):
            self.content.close()


class Adapters:
    """For the owner's thread; `infos` is for all. `detach(digest)` takes a content off every context before its end."""

    def __init__(self, detach: Callable[[str], None]) -> None:
        self._detach = detach
        self._held: dict[str, _Held] = {}
        self.infos: Mapping[str, AdapterInfo] = {}

    @property
    def n_bytes(self) -> int:
        """Of all contents, each once."""
        sizes = {info.digest: info.size_bytes for info in self.infos.values()}
        return sum(sizes.values())

    def add(self, info: AdapterInfo, load: Callable[[], Lora | Head]) -> None:
        """Let `info.name` mean this content from now on; `load` is called if it is not in memory."""
        held = self._held.get(info.digest) or _Held(load(), info.invocation)
        self._held[info.digest] = held
        held.names += 1
        before = self.infos.get(info.name)
        self.infos = {**self.infos, info.name: info}
        if before is not None:
            self._held[before.digest].names -= 1
            self._free_unused(before.digest)

    def remove(self, name: str) -> bool:
        """Forget a name; False, and nothing is changed, if that would free what an answer is computed with."""
        held = self._held[digest := self._find(name).digest]
        if held.uses and held.names == 1:
            return False
        held.names -= 1
        self.infos = {other: info for other, info in self.infos.items() if other != name}
        self._free_unused(digest)
        return True

    def key_of(self, asked: Mapping[str, float]) -> Key:
        """The contents and scales that are meant. Two names of one content add up: llama.cpp would ignore the second.

        Raises AdapterError for a name that is not there, EngineError for a scale beyond MAX_SCALE, and for soft
        prompts and prefixes that are not alone, or not at 1.
        """
        scales: dict[str, float] = defaultdict(float)
        for name, scale in asked.items():
            scales[self._find(name).digest] += _within_limits(scale, name)
        for digest, scale in scales.items():
            _within_limits(scale, f"what has the digest {digest[:12]}")
        key = tuple(sorted((digest, scale) for digest, scale in scales.items() if scale))
        _require_one_head([(digest, scale) for digest, scale in key if self._held[digest].head is not None])
        return key

    def loras(self, key: Key) -> list[tuple[Lora, float]]:
        """The LoRAs of a key at their scales; what stands before prompts is left out."""
        contents = [(self._held[digest].content, scale) for digest, scale in key]
        return [(content, scale) for content, scale in contents if isinstance(content, Lora)]

    def head(self, key: Key) -> Head:
        """What stands before prompts under this key, which must have such a content."""
        return next(head for digest, _ in key if (head := self._held[digest].head) is not None)

    def behind_head(self, prompt: Sequence[int], key: Key) -> list[int]:
        """A prompt with NO_TOKEN before it for each position that a content of this key takes."""
        heads = [head for digest, _ in key if (head := self._held[digest].head) is not None]
        return [NO_TOKEN] * sum(head.length for head in heads) + list(prompt)

    def phases(self, prompt: Sequence[int], key: Key) -> list[tuple[int, Key]]:
        """Which adapters are active from which position on: an aLoRA from the last place where it is invoked."""
        begins = {
            digest: last_place(self._held[digest].invocation, prompt) for digest, _ in key
        }  # fmt: skip
        starts = sorted({0, *(begin for begin in begins.values() if begin is not None)})
        return [
            (start, tuple(e for e in key if (begin := begins[e[0]]) is not None and begin <= start)) for start in starts
        ]

    def hold(self, key: Key) -> None:
        """Keep the contents of a key for an answer, until `release`."""
        for digest, _ in key:
            self._held[digest].uses += 1

    def release(self, key: Key) -> None:
        """An answer has ended: what no name and no other answer needs is freed."""
        for digest, _ in key:
            self._held[digest].uses -= 1
            self._free_unused(digest)

    def close(self) -> None:
        """Before the model is closed, which frees them all."""
        for held in self._held.values():
            held.close()
        self._held.clear()
        self.infos = {}

    def _find(self, name: str) -> AdapterInfo:
        if name not in self.infos:
            raise unknown_adapter(name, self.infos)
        return self.infos[name]

    def _free_unused(self, digest: str) -> None:
        held = self._held[digest]
        if not held.names and not held.uses:
            self._detach(digest)
            held.close()
            del self._held[digest]


def _within_limits(scale: float, name: str) -> float:
    """As llama.cpp keeps it: float32. Raises EngineError."""
    require_scale(scale, name)
    return float(np.float32(scale))


def _require_one_head(heads: Sequence[tuple[str, float]]) -> None:
    if len(heads) > 1 or any(scale != 1 for _, scale in heads):
        raise EngineError(
            what=", ".join(f"a soft prompt or prefix at the scale {scale:g}" for _, scale in heads),
            why="one stands before a prompt, as it was trained: half of one or one behind another means nothing",
            fix="use one, at 1; LoRAs may be active beside it at any scale",
        )


def last_place(invocation: tuple[int, ...], prompt: Sequence[int]) -> int | None:
    """Where the last invocation in `prompt` begins; 0 for an adapter that waits for none, None if there is none."""
    n = len(invocation)
    return next((i for i in range(len(prompt) - n, -1, -1) if tuple(prompt[i : i + n]) == invocation), None) if n else 0
