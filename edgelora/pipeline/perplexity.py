"""Perplexity of a text by llama.cpp, and how far its predictions are from a reference's: in a child process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.device import peak_memory_bytes, physical_cores
from edgelora.errors import ConfigError, DataError
from edgelora.evaluate.divergence import ROWS, Candidate, Compared, Divergence, Exact, Reference, compare, divergence
from edgelora.evaluate.perplexity import Perplexity, Window, perplexity_of
from edgelora.evaluate.protocols import Scorer
from edgelora.evaluate.reference_file import ReferenceFile, ReferenceWriter, about_file, is_reference
from edgelora.evaluate.taken import WindowSums
from edgelora.pipeline.engines import AUTO, LLAMA_CPP, TORCH, as_trained, choose_engine
from edgelora.pipeline.parity import text_windows
from edgelora.progress import OnProgress, Pace, Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

Logits = Callable[[Window], np.ndarray]
"""float32 (n, V), what follows the positions that predict a window's targets; a view until the next call."""
TOP = 256


@dataclass(frozen=True)
class Run:
    """What to measure. `engine`: as `choose_engine` says. `chunks`: how many windows of `context` tokens, None for the
    whole text. `against`: a model that runs beside, or a reference file, whose text is taken then. `save`: where to
    keep this model's own predictions, the `top` likeliest of each position, or all if its name ends in .kld."""

    model: Path
    text: Path | None = None
    adapter: tuple[Path, float] | None = None
    against: Path | None = None
    save: Path | None = None
    context: int = 512
    chunks: int | None = None
    top: int = TOP
    threads: int | None = None
    allow_unverified: bool = False
    engine: str = LLAMA_CPP


@dataclass(frozen=True)
class Measured:
    """What was found. `bits_per_byte`: of the scored tokens' text, which compares models of different tokenizers."""

    model: str
    perplexity: Perplexity
    bits_per_byte: float
    n_windows: int
    context: int
    against: str | None
    divergence: Divergence | None
    tokens_per_s: float
    peak_bytes: int
    by_window: tuple[WindowSums, ...]
    against_top: int | None = None
    """How many tokens the reference file keeps of each position: KL is then never above the true; None: all."""

    def as_dict(self) -> dict[str, Any]:
        value, error, n_tokens = self.perplexity.value, self.perplexity.error, self.perplexity.n_tokens
        return {
            "model": self.model, "perplexity": value, "error": error, "scored_tokens": n_tokens,
            "bits_per_byte": self.bits_per_byte, "windows": self.n_windows, "context": self.context,
            "against": self.against, "against_top": self.against_top,
            "divergence": None if self.divergence is None else self.divergence.as_dict(),
            "tokens_per_s": self.tokens_per_s, "peak_bytes": self.peak_bytes,
        }  # fmt: skip


def measure(run: Run, on_progress: OnProgress = silent) -> Measured:
    """Score the text. Raises DataError for one shorter than a window, ConfigError where the two sides do not match,
    EngineError for logits that are not finite."""
    return run_in_child(_measure, run, with_torch=run.engine == TORCH, on_progress=on_progress)


def _measure(run: Run, on_progress: OnProgress) -> Measured:
    base = as_trained(run.model, run.adapter and run.adapter[0])
    stored = _stored(run.against)
    parts = _windows(run, base, stored)
    size, pace = len(parts[0].ids), Pace(len(parts))
    with ExitStack() as stack:
        logits = stack.enter_context(_open(run, base, size))
        writer = _writer(run, base, parts)
        references = stack.enter_context(_references(run, base, stored, parts))
        compared: list[Compared] = []
        try:
            for i, window in enumerate(parts):
                rows = logits(window)
                if writer is not None and i >= writer.done:
                    writer.add(rows, window.targets)
                compared.append(_compared(references(i), rows, window))
                speed, eta = pace.step(size)
                on_progress(Progress("score", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))
        finally:
            if writer is not None:
                writer.close(whole=len(compared) == len(parts))
    found = perplexity_of(np.concatenate([window.nll for window in compared]))
    sizes = _token_bytes(base, parts)
    nats = math.log(found.value) * found.n_tokens
    sums = tuple(_sums(one, size, run.against is not None) for one, size in zip(compared, sizes, strict=True))
    return Measured(
        model=run.model.name, perplexity=found, bits_per_byte=nats / math.log(2) / sum(sizes), n_windows=len(parts),
        context=size, against=run.against.name if run.against else None,
        divergence=divergence(compared) if run.against else None, tokens_per_s=speed, peak_bytes=peak_memory_bytes(),
        by_window=sums, against_top=None if stored is None else stored.about.top,
    )  # fmt: skip


def _compared(reference: Reference | None, logits: np.ndarray, window: Window) -> Compared:
    """Against the reference; without one, −log p alone."""
    if reference is not None:
        return compare(reference, logits, window.targets)
    nll = [
        Candidate(logits[first : first + ROWS], window.targets[first : first + ROWS]).nll
        for first in range(0, len(window.targets), ROWS)
    ]
    nothing = np.empty(0)
    return Compared(np.concatenate(nll), nothing, nothing, nothing)


def _sums(window: Compared, n_bytes: int, against: bool) -> WindowSums:
    n_tokens, nll = len(window.nll), float(window.nll.sum(dtype=np.float64))
    if not against:
        return WindowSums(n_tokens, n_bytes, nll)
    return WindowSums(n_tokens, n_bytes, nll, float(window.kl.sum()), int(window.same_top.sum()))


def _stored(against: Path | None) -> ReferenceFile | None:
    return ReferenceFile(against) if against is not None and against.is_file() and is_reference(against) else None


def _windows(run: Run, base: Base, stored: ReferenceFile | None) -> list[Window]:
    """Of the text; with a reference file, those that it was made of, with BOS in front where this model has it."""
    if stored is not None:
        if stored.about.n_vocab != base.config.vocab_size:
            raise ConfigError(
                what=f"{stored.path}: its vocabulary has {stored.about.n_vocab:,} tokens",
                why=f"{run.model.name} has {base.config.vocab_size:,}: their predictions cannot be compared",
                fix="compare with a reference of the same tokenizer; bits per byte compares across them",
            )
        tokenizer = base.tokenizer
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            for window in stored.windows:
                window.ids[0] = tokenizer.bos_id
        return stored.windows[: run.chunks]
    if run.text is None:
        raise ConfigError(
            what="there is no text to score",
            why="only a reference file brings its own",
            fix="pass --text FILE",
        )
    return read_windows(run.text, base, run.context, run.chunks)


def read_windows(path: Path, base: Base, context: int, chunks: int | None) -> list[Window]:
    """Of a text, at most `chunks`. Raises DataError for one that cannot be read or is shorter than a window."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(what=f"{path} cannot be read as UTF-8 text", why=str(e), fix="check the file") from e
    parts = text_windows(base, text, context, chunks or len(text) // context + 1)
    if not parts:
        raise DataError(
            what=f"{path}: it is shorter than one window of {context} tokens",
            why="only whole windows are scored, so that figures of different texts mean the same",
            fix="pass a longer text, or a smaller --context",
        )
    return parts


@contextmanager
def _open(run: Run, base: Base, size: int) -> Iterator[Logits]:
    """The model where it runs; in llama.cpp one window a decode, the shape that gives llama-perplexity's digits."""
    if run.context > base.context:
        raise ConfigError(
            what=f"--context {run.context}",
            why=f"{base.path.name} sees {base.context} tokens at most",
            fix=f"pass at most --context {base.context}",
        )

    def rows(scorer: Scorer) -> Logits:
        return lambda window: scorer.logits([window.ids.tolist()], [range(window.first - 1, size - 1)])

    if run.engine == TORCH:
        from edgelora.pipeline.torch_scorer import open_scorer

        yield rows(open_scorer(base, run.adapter, run.threads, allow_unverified=run.allow_unverified))
        return
    from runtime.scorer import ScoringEngine

    with ScoringEngine(base, n_ctx=size, threads=run.threads or physical_cores()) as engine:
        if run.adapter is not None:
            path, scale = run.adapter
            engine.load("adapter", path, allow_unverified=run.allow_unverified)
            engine.use({"adapter": scale})
        yield rows(engine)


@contextmanager
def _references(
    run: Run, base: Base, stored: ReferenceFile | None, parts: Sequence[Window]
) -> Iterator[Callable[[int], Reference | None]]:
    """The reference's window of each number."""
    if run.against is None:
        yield lambda _: None
    elif stored is not None:
        yield stored.window
    else:
        other = open_base(run.against)
        if other.vocabulary.tokens != base.vocabulary.tokens:
            raise ConfigError(
                what=f"{run.against.name} and {run.model.name} have different vocabularies",
                why="KL compares what both say of the same next token",
                fix="compare with a reference of the same tokenizer; bits per byte compares across them",
            )
        engine = choose_engine(AUTO, run.against, None).value
        alone = Run(run.against, context=run.context, threads=run.threads, engine=engine)
        with _open(alone, other, len(parts[0].ids)) as logits:
            yield lambda i: Exact(logits(parts[i]))


def _writer(run: Run, base: Base, parts: Sequence[Window]) -> ReferenceWriter | None:
    if run.save is None:
        return None
    sha256 = base.base_file.sha256
    about = about_file(run.save, len(parts[0].ids), base.config.vocab_size, len(parts), run.top, sha256)
    return ReferenceWriter(run.save, about, parts)


def _token_bytes(base: Base, parts: Sequence[Window]) -> list[int]:
    """How many bytes of text the scored tokens of each window stand for."""
    return [sum(len(base.tokenizer.piece(token)) for token in part.targets.tolist()) for part in parts]
