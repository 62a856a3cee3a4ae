"""How much memory a merge takes, on a synthetic checkpoint of several GB: at most 3 of its largest tensor + 300 MB.

    .venv/bin/python benchmarks/export_memory.py [--layers 22 88] [--folder build] [--out FILE]

Llamas 2048 wide with SmolLM2's vocabulary, bfloat16, one shard for each 11 layers, whose numbers are one drawn block
again and again. Each is merged with an adapter of rank 16 on all linears into Q8_0 and into a folder, in a fresh
process; the peak is its largest resident set, mapped pages included. `--folder` must lie on a disk: in tmpfs the files
themselves would be memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from export import ADAPTER, DEFAULT_BASE, PROCESSOR, RANK, ROOT, WRITE, answer, run, verdict

TO_FOLDER = """
import sys
from pathlib import Path
from converters.merge_to_hf import write_merged_folder
from edgelora.pipeline.merge import open_parts
base, parts = open_parts(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)], allow_unverified=False)
Path(sys.argv[3]).mkdir()
write_merged_folder(Path(sys.argv[3]), base, parts)
"""

CHECKPOINT = """
import json, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, "benchmarks")
from peers.checkpoint import _write_tokenizer
from edgelora.base.model import open_base
small, folder, layers = open_base(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
d, inner, vocabulary, per_shard = 2048, 5632, small.config.vocab_size, 11
folder.mkdir()
_write_tokenizer(small, folder)
matrices = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (256, d), "self_attn.v_proj": (256, d),
            "self_attn.o_proj": (d, d), "mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d),
            "mlp.down_proj": (d, inner)}
norms = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
shards = [{"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}]
for i in range(layers):
    if i and i % per_shard == 0:
        shards.append({})
    shards[-1] |= {f"model.layers.{i}.{name}.weight": shape for name, shape in (matrices | norms).items()}
block = (np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
weight_map = {}
for number, shard in enumerate(shards, 1):
    name, header, end = f"model-{number:05d}-of-{len(shards):05d}.safetensors", {"__metadata__": {"format": "pt"}}, 0
    for tensor, shape in shard.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        weight_map[tensor] = name
    raw = json.dumps(header).encode()
    with (folder / name).open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for shape in shard.values():
            left = int(np.prod(shape))
            while left:
                f.write(block[: min(left, len(block))].data)
                left -= min(left, len(block))
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
(folder / "config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": d,
    "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
    "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}))
print(2 * vocabulary * d)
"""


def measure(room: Path, gguf: str, layers: int) -> list[dict[str, object]]:
    """The peak of each kind of merge into a checkpoint of so many layers."""
    base, adapter, rows = room / f"llama-{layers}", room / f"adapter-{layers}", []
    words = [sys.executable, "-c", CHECKPOINT, gguf, str(base), str(layers)]
    largest = int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    run([sys.executable, "-c", ADAPTER, base, adapter, str(RANK)])
    limit = 3 * largest + 300_000_000
    for to, code in (("Q8_0", WRITE), ("hf", TO_FOLDER)):
        out = room / f"out-{layers}-{to}"
        cpu_s, peak = run([sys.executable, "-c", code, base, adapter, out, to])
        rows.append({
            "layers": layers, "to": to, "model_bytes": size, "largest_tensor_bytes": largest, "limit_bytes": limit,
            "peak_bytes": peak, "cpu_s": round(cpu_s, 1), "met": peak <= limit,
        })  # fmt: skip
        subprocess.run(["rm", "-r", str(out)], check=True)
    subprocess.run(["rm", "-r", str(base)], check=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[22, 88])
    parser.add_argument("--folder", type=Path, default=ROOT / "build")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "export-memory.json")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    gguf = answer(DEFAULT_BASE)
    with tempfile.TemporaryDirectory(prefix="edgelora-export-", dir=asked.folder) as room:
        rows = [row for layers in asked.layers for row in measure(Path(room), gguf, layers)]
    print("| model, GB | to | peak, MB | limit, MB | |\n|---|---|---|---|---|")
    for row in rows:
        model, peak, limit = (int(str(row[key])) for key in ("model_bytes", "peak_bytes", "limit_bytes"))
        met = verdict(bool(row["met"]))
        print(f"| {model / 1e9:.1f} | {row['to']} | {peak / 1e6:.0f} | {limit / 1e6:.0f} | {met} |")
    found = {"processor": answer(PROCESSOR), "rows": rows}
    asked.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
