"""The one exception tree: every error a user can cause says what happened, why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class EdgeloraError(Exception):
    """A fault with three lines: *what* happened, *why*, and the *fix*. The command line prints just these."""

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join((_visible(self.what), f"  why: {_visible(self.why)}", f"  fix: {_visible(self.fix)}"))

    def __reduce__(self) -> tuple[type[EdgeloraError], tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.fix)


def _visible(text: str) -> str:
    """A stranger's file may name its parts with what moves the cursor or colours the terminal: shown, not done."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def some(faults: Sequence[str], most: int = 8) -> str:
    """Faults of one thing, for its `what`: the first of them, and how many more there are."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more


class ConfigError(EdgeloraError):
    """A setting that cannot be, or settings that contradict each other."""


class FileFormatError(EdgeloraError):
    """A GGUF, safetensors or JSON file that is not what it claims to be."""


class OutputError(EdgeloraError):
    """A result that cannot be written where it was asked for."""


class BaseModelError(EdgeloraError):
    """A base model that cannot be opened."""


class DataError(EdgeloraError):
    """Training or evaluation data that cannot be used."""


class AdapterError(EdgeloraError):
    """An adapter that does not fit, or is not whole."""


class ExportError(EdgeloraError):
    """A conversion that failed or would run wrongly."""


class CertificateError(ExportError):
    """An exported file that does not compute what the torch model computes, or ids that are not llama.cpp's."""

    exit_code = 3


class EngineError(EdgeloraError):
    """llama.cpp refused something, or a handle was used after its end."""


class WorkerDied(EngineError):
    """The process that held the model ended in the midst of what it was asked."""


class Quarantined(EngineError):
    """A request or an adapter that ended that process too often to be given to it again."""
