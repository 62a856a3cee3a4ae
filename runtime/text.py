"""The bytes of tokens as text: whole characters only, and never the beginning of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns an answer's bytes, as they come, into text. What it gives does not depend on where tokens end.

    An answer ends at the stop string that is complete first (of two that end together, the longer), which is not
    given. Bytes that are no UTF-8 become U+FFFD, as `bytes.decode("utf-8", "replace")` has it.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the answer."""

    def push(self, raw: bytes) -> str:
        """Take in the bytes of a token; returns what can be shown now. Nothing comes after the stop string."""
        return self._take(self._decoder.decode(raw))

    def finish(self) -> str:
        """The answer has ended: returns what was held back, an incomplete character replaced."""
        text = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _take(self, text: str) -> str:
        if self.stopped is not None or not text:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, length, self.stopped = min(found)
            self._held = ""
            return text[: end + length]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class WholeCharacters:
    """Holds an answer to UTF-8, token by token: what a grammar of characters says nothing about."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")

    def allows(self, raw: bytes, *, last: bool) -> bool:
        """Whether the answer stays UTF-8 with `raw` behind it; `last`: and ends with a whole character."""
        state = self._decoder.getstate()
        try:
            self._decoder.decode(raw, final=last)
            begun, _ = self._decoder.getstate()
        except UnicodeDecodeError:
            return False
        finally:
            self._decoder.setstate(state)
        return not b"\xed\xa0" <= begun < b"\xee"  # half a surrogate pair, which Python notices a byte later

    def accept(self, raw: bytes) -> None:
        """Go on behind `raw`, which must be allowed."""
        self._decoder.decode(raw)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
