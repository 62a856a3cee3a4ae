"""Who is to blame for a crash: requests and files by their digests, and which of them are refused from now on.

Nobody sees what C code was doing when it ended the process, only what was being asked of it. What was asked alone is to
blame; of several things asked at once each takes half; an adapter that was only in use takes half beside the request.
Whatever was answered since is free of blame.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict

from edgelora.errors import Quarantined
from runtime.service import Request

LIMIT = 2.0  # deaths


class Blame:
    """The record of one worker. Keys are made by the functions below. Not safe to use from several threads at once."""

    def __init__(self) -> None:
        self._deaths: defaultdict[str, float] = defaultdict(float)

    def died(self, suspects: Collection[str], in_use: Iterable[str] = ()) -> None:
        """The child died while it had these."""
        for key in suspects:
            self._deaths[key] += 1.0 if len(suspects) == 1 else 0.5
        for key in in_use:
            self._deaths[key] += 0.5

    def answered(self, *keys: str) -> None:
        """They got through."""
        for key in keys:
            self._deaths.pop(key, None)

    def __bool__(self) -> bool:
        """Whether there is any reason to compute a key."""
        return bool(self._deaths)

    def __contains__(self, key: str) -> bool:
        return self._deaths.get(key, 0.0) >= LIMIT

    def require_innocent(self, key: str, what: str) -> None:
        """Raise Quarantined if it has ended the child too often."""
        if key in self:
            raise Quarantined(
                what=f"{what} is refused",
                why=f"the process that holds the model died of it ({self._deaths[key]:g} times counted)",
                fix="change it; as it is, it is not given to llama.cpp again before the worker is opened anew",
            )


def loading(digest: str) -> str:
    """The key of an adapter file that is being loaded."""
    return f"load {digest}"


def using(digest: str) -> str:
    """The key of a loaded adapter under which something is answered."""
    return f"use {digest}"


def asking(request: Request) -> str:
    """The key of a request: equal requests have equal keys, in whatever order their dicts were filled."""
    text = json.dumps(asdict(request), sort_keys=True, default=str)
    return f"ask {hashlib.sha256(text.encode()).hexdigest()}"
