"""Contexts of llama.cpp, each with its sequences and the adapters that are set on it.

One decode has one set of adapters. Changing it makes llama.cpp reserve its graph anew with the next decode (4 to 10 ms
on two cores, SmolLM2-135M); a context of its own for each set that is in use avoids that, for the memory of its keys
and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgelora.errors import EngineError
from runtime.adapters import Adapters
from runtime.binding import Context, Entry
from runtime.states import Chain, Key, Part, Slot, Snapshot, Snapshots, common


class Lane:
    """A context and its sequences. `chunk`: where reuse may end."""

    def __init__(self, context: Context, adapters: Adapters, snapshots: Snapshots, chunk: int) -> None:
        self.context, self.key = context, Key()
        self.slots = [Slot(i) for i in range(context.n_sequences)]
        self._adapters, self._snapshots, self._chunk = adapters, snapshots, chunk
        self._turn = 0

    @property
    def has_room(self) -> bool:
        """Whether a sequence is free for an answer."""
        return any(not slot.busy for slot in self.slots)

    @property
    def idle(self) -> bool:
        """Whether no sequence is in work."""
        return not any(slot.busy for slot in self.slots)

    @property
    def last_used(self) -> int:
        """The turn in which one of its sequences was last taken."""
        return max(slot.used for slot in self.slots)

    def attach(self, key: Key) -> None:
        """Evaluate with these adapters from now on. What was computed stays: its digests say what with."""
        if key != self.key:
            self.context.set_adapters(self._adapters.loras(key))
            self.key = key

    # -- sequences ------------------------------------------------------------------------------------------------

    def take(self, chain: Chain, key: Key, turn: int) -> tuple[Slot, int]:
        """A free sequence for an answer by `key` to a prompt of these digests; how many of its chunks it holds already.

        Whatever holds the most of them is used: this sequence itself, one beside it, a snapshot. What the sequence
        held and the prompt does not go on from is kept as a snapshot.
        """
        free = [slot for slot in self.slots if not slot.busy]
        nearest = max(free, key=lambda slot: (common(slot.chain, chain), -slot.used))
        shared = common(nearest.chain, chain)
        beside = max(self.slots, key=lambda slot: common(slot.chain, chain))
        kept = self._snapshots.longest(chain)
        best = max(shared, common(beside.chain, chain), kept[0] if kept else 0)
        slot = nearest if best == shared > 0 else self._well_placed(free, key)
        self.keep(slot, best if best == shared else 0)
        if best > shared:
            self._refill(slot, beside if common(beside.chain, chain) == best else None, kept and kept[1])
        self.context.forget(slot.sequence, best * self._chunk)
        slot.chain, slot.key, slot.busy, slot.used = chain[:best], key, True, turn
        return slot, best

    def _well_placed(self, free: Sequence[Slot], key: Key) -> Slot:
        """llama.cpp evaluates sequences together if their numbers are consecutive: a place beside the same adapters,
        else one with room around it; there an empty one, else the one that rested longest."""

        def order(slot: Slot) -> tuple[int, bool, int]:
            i = slot.sequence
            around = [other for other in self.slots[max(i - 1, 0) : i + 2] if other.busy]
            alike = any(other.key == key for other in around)
            return (-1 if alike else len(around)), bool(slot.chain), slot.used

        return min(free, key=order)

    def _refill(self, slot: Slot, beside: Slot | None, kept: Snapshot | None) -> None:
        self.context.forget(slot.sequence, 0)
        slot.chain = ()
        if beside is not None:
            # not `copy`: llama.cpp would carry it out with the next decode, and a state saved before would lack it
            self.context.restore(slot.sequence, self.context.save(beside.sequence))
        elif kept is not None:
            self.context.restore(slot.sequence, kept.state)

    def keep(self, slot: Slot, shared: int) -> None:
        """Save what the sequence holds up to its last cut, unless it goes on from there."""
        if shared < len(slot.chain):
            self.context.forget(slot.sequence, len(slot.chain) * self._chunk)
            if self._snapshots.wants(slot.chain, self.context.state_bytes(slot.sequence)):
                self._snapshots.keep(Snapshot(slot.chain, self.context.save(slot.sequence)))

    def drop(self, slot: Slot) -> None:
        """Forget what a sequence holds: it failed."""
        self.context.forget(slot.sequence, 0)
        slot.chain = ()

    # -- evaluating -----------------------------------------------------------------------------------------------

    def evaluate(self, part: Part, slot: Slot, *, last: bool) -> np.ndarray:
        """Evaluate a part of a prompt in a decode of its own; float32 (1, V) if it is the last one, else (0, V)."""
        self.attach(part.key)
        if part.is_head:
            self._adapters.head(part.key).put(self.context, slot.sequence, part.first, part.last)
            return np.empty((0, self.context.model.n_vocab), np.float32)
        end = len(part.tokens) - 1
        return self.context.decode(
            [Entry(token, part.first + i, slot.sequence, last and i == end) for i, token in enumerate(part.tokens)]
        )

    def step(self, key: Key, work: Sequence[tuple[Slot, int, Sequence[int]]]) -> list[np.ndarray]:
        """Evaluate tokens of several sequences in one decode, each from a position on.

        Returns the logits behind each token: float32 (n tokens, V) a sequence, overwritten by the next decode.
        """
        self.attach(key)
        rows = self.context.decode(
            [
                Entry(token, first + i, slot.sequence, True)
                for slot, first, tokens in work
                for i, token in enumerate(tokens)
            ]
        )
        if len(work) == len(rows):
            return list(rows[:, None])
        return np.split(rows, np.cumsum([len(tokens) for _, _, tokens in work[:-1]]))

    def forget(self, slot: Slot, position: int) -> None:
        """A sequence holds only what stands before `position`."""
        self.context.forget(slot.sequence, position)


class Lanes:
    """The first lane takes every set of adapters; up to `spare` more are opened for sets that come beside it."""

    def __init__(self, first: Lane, spare: int, another: Callable[[], Lane]) -> None:
        self.all, self._spare, self._another = [first], spare, another

    def choose(self, key: Key) -> int:
        """The lane for a new answer: one that has these adapters set, a new one, or the one that rested longest."""
        free = [i for i, lane in enumerate(self.all) if lane.has_room]
        for i in free:
            if self.all[i].key == key or self.all[i].last_used == 0:
                return i
        if len(self.all) <= self._spare:
            try:
                self.all.append(self._another())
            except EngineError:
                self._spare = len(self.all) - 1  # no memory for more: those that are there take turns
            else:
                return len(self.all) - 1
        return min(free, key=lambda i: (not self.all[i].idle, self.all[i].last_used))

    def detach(self, digest: str) -> None:
        """Take a content off every context: it is about to be freed."""
        for lane in self.all:
            if any(other == digest for other, _ in lane.key):
                lane.attach(())

    def keep_all(self) -> None:
        """Save what all sequences hold, for the archive: the engine is about to be closed."""
        for lane in self.all:
            for slot in lane.slots:
                lane.keep(slot, 0)

    def close(self) -> None:
        for lane in self.all:
            lane.context.close()
