"""Perplexity of the torch decoder against llama.cpp's, over the same files and windows (llama-perplexity's protocol).

python benchmarks/parity.py MODEL… --text TEXT [--chunks 16] [--out benchmarks/results/parity.json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from edgelora.pipeline.parity import parity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = args.text.read_bytes().decode("utf-8")  # line ends as they are: they are tokens
    rows = []
    print("| model | quant | torch | llama.cpp | apart | llama.cpp on its F16 | apart |\n|---|---|---|---|---|---|---|")
    for path in args.models:
        row = parity(path, text, args.size, args.chunks)
        rows.append({**asdict(row), "against_file": row.against_file, "against_f16": row.against_f16})
        print(
            f"| {row.model} | {row.quant} | {row.torch.value:.4f} | {row.llama_cpp.value:.4f} "
            f"| {row.against_file:+.2%} | {row.llama_cpp_f16.value:.4f} | {row.against_f16:+.3%} |", flush=True,
        )  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
