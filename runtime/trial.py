"""The first load of a stranger's adapter, in a throw-away process: what crashes llama.cpp crashes it there.

`try_adapter` is called by the engine's process; `main` is that of the child, which has no secrets, little memory and
little time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from edgelora.errors import AdapterError, EdgeloraError

TRIAL_SECONDS = 120.0
MEMORY_BYTES = 2 << 30  # beside the adapter itself; the base stays mapped and does not count
TOKENS = 4
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtime.trial import main; main(sys.argv[2:])"
REFUSED = 3


def try_adapter(
    path: Path, content: bytes, base: Path, seconds: float = TRIAL_SECONDS, memory_bytes: int = MEMORY_BYTES
) -> None:
    """Load the adapter `content` over `base` in a child, evaluate a few tokens with it, and look at the logits.

    `path` is its name in messages. Raises AdapterError, with the child's last words, if it does not end well.
    """
    words = [sys.executable, "-P", "-c", START, json.dumps(sys.path), str(path), str(base)]
    words += [str(memory_bytes + 4 * len(content)), str(int(seconds) + 1)]
    try:
        done = subprocess.run(
            words, input=content, capture_output=True, timeout=seconds, check=False, env=_surroundings()
        )
    except subprocess.TimeoutExpired as e:
        raise AdapterError(
            what=f"{path}: llama.cpp did not get it to work within {seconds:g} seconds",
            why="it was tried in a process of its own, which was stopped",
            fix="try again when the machine is less busy; if it happens again, export the adapter anew",
        ) from e
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    raise AdapterError(
        what=f"{path}: llama.cpp cannot run it ({_end(done.returncode)})",
        why="tried in a process of its own it said: " + (" | ".join(said[-3:])[-500:] or "nothing"),
        fix="export the adapter again for this base; this process is unharmed",
    )


def _surroundings() -> dict[str, str]:
    """Of the child: one thread, no debugger at an abort, and none of the GPU's memory."""
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def _end(code: int) -> str:
    if code == REFUSED:
        return "refused"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def main(words: list[str]) -> None:
    """The child: adapter's name, base, memory limit in bytes, CPU seconds; the adapter's bytes come on stdin."""
    path, base, memory_bytes, seconds = Path(words[0]), Path(words[1]), int(words[2]), int(words[3])
    _limit(memory_bytes, seconds)
    content = sys.stdin.buffer.read()
    try:
        _evaluate(path, content, base)
    except EdgeloraError as e:
        sys.stderr.write(f"{e.what}: {e.why}\n")
        sys.exit(REFUSED)


def _limit(memory_bytes: int, seconds: int) -> None:
    import resource

    # data, not address space: a mapped base may be larger than all memory (macOS holds nobody to it)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _evaluate(path: Path, content: bytes, base: Path) -> None:
    import numpy as np

    from runtime.binding import Context, Entry, Lora, Model

    model = Model(base, repack=False)  # all weights stay in the file: loading reads the vocabulary alone
    context = Context(model, n_ctx=32, n_sequences=1, threads=1, n_batch=32)
    context.set_adapters([(Lora(model, path, content), 1.0)])
    tokens = np.random.default_rng(0).integers(model.n_vocab, size=TOKENS)
    logits = context.decode([Entry(int(token), i, 0, True) for i, token in enumerate(tokens)])
    if not np.isfinite(logits).all():
        raise AdapterError(
            what="its answers are not finite numbers",
            why="its weights are finite, and too large to compute with",
            fix="train it with a smaller learning rate",
        )
