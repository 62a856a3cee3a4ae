"""llama.cpp as Python calls it, what it says when it refuses, and what every handle of it has in common."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

from edgelora.errors import EngineError
from runtime.openmp import bounded_spin

with bounded_spin():
    import llama_cpp as C

__all__ = ["C", "InC", "last_words", "refused"]

last_words: deque[str] = deque(maxlen=8)


@C.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level in (3, 4):  # warnings and errors
        last_words.append(text.decode("utf-8", "replace").strip())


C.llama_log_set(_on_log, ctypes.c_void_p(0))
C.llama_backend_init()


def refused(what: str, fix: str) -> EngineError:
    """The error for what llama.cpp did not do; its last words are the reason."""
    return EngineError(what=what, why=" | ".join(last_words) or "llama.cpp gave no reason", fix=fix)


class InC:
    """What lies in C: it has one owner, and one way to die."""

    _kind: str
    _fix: str
    _handle: Any = None

    @property
    def handle(self) -> Any:
        """What C is given. Raises EngineError once it is closed."""
        if self._handle is None:
            raise EngineError(what=f"a closed {self._kind} was used", why="close() frees it", fix=self._fix)
        return self._handle
