"""What a process that answers holds of its own in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

RESIDENT = """
import os, sys
def resident():
    fields = dict(line.split(':', 1) for line in open('/proc/self/status'))
    return (int(fields['RssAnon'].split()[0]) + int(fields['RssShmem'].split()[0])) * 1024
"""


def memory(base: Path, rounds: int) -> dict[str, Any]:
    """Private memory of a process that answers, by the engine and by the binding alone; mapped files do not count."""
    bare = (
        RESIDENT + "import ctypes, llama_cpp as C, numpy as np\n"
        "s = C.llama_model_default_params(); s.n_gpu_layers = 0\n"
        "m = C.llama_model_load_from_file(sys.argv[1].encode(), s)\n"
        "p = C.llama_context_default_params(); p.n_ctx = 2048; p.n_batch = p.n_ubatch = 64\n"
        "c = C.llama_init_from_model(m, p); b = C.llama_batch_init(64, 0, 1)\n"
        "for start in range(0, 128, 64):\n"
        "    b.n_tokens = 64\n"
        "    for i in range(64):\n"
        "        b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = 7, start + i, 1, 0, i == 63\n"
        "    C.llama_decode(c, b)\n"
        "print(resident())\n"
    )
    ours = (
        RESIDENT + "from pathlib import Path\nfrom runtime.engine import Engine\n"
        "from runtime.service import EngineConfig, Request\n"
        "engine = Engine.open(Path(sys.argv[1]), EngineConfig(context=2048, threads=1))\n"
        "list(engine.generate(Request((7,) * 130, max_tokens=4)))\nprint(resident())\nengine.close()\n"
    )

    def run(code: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", code, str(base)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
        )
        return int(done.stdout.splitlines()[-1])

    runs = [(run(ours), run(bare)) for _ in range(min(rounds, 3))]
    return {
        "engine_bytes": int(median(a for a, _ in runs)), "llama_cpp_bytes": int(median(b for _, b in runs)),
        "more_bytes": int(median(a - b for a, b in runs)),
    }  # fmt: skip
