"""What a training step costs over each way to hold the frozen weights, against a step over dense float32 ones.

    .venv/bin/python benchmarks/step.py [--base FILE] [--tokens 768] [--rounds 15] [--out benchmarks/results/step.json]

One decoder and one LoRA; between steps its linear layers change weights, so that steps over all ways are interleaved.
K-quants need rows of 256: they are measured on the same model padded exactly from 576 to 768 wide.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.base.hold import hold
from edgelora.base.model import open_base
from edgelora.base.tensors import Stored
from edgelora.base.weights import Dense
from edgelora.data.pack import IGNORE, Batch
from edgelora.device import choose_products, physical_cores, processor_name
from edgelora.nn.decoder import Decoder
from edgelora.nn.frozen import Frozen
from edgelora.nn.linear import Weight
from edgelora.peft.inject import inject
from edgelora.training.objectives.log_p import token_nll

RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-4
SEGMENT = 128  # tokens of an example, of which the last third is learned
WIDTH = 768
AS_IT_IS, PADDED = ("f32", "bf16", "nf4", "q4_0", "q8_0"), ("f32", "q4_k", "q6_k", "nf4")
TARGETS = {"q4_0": 1.05, "q8_0": 1.05, "q4_k": 1.05}  # times the dense float32 step


def floats_of(path: Path) -> tuple[Architecture, ModelConfig, Frozen]:
    """A base's weights, all dense float32."""
    from edgelora.base.decoder import build_decoder

    base = open_base(path)
    decoder = build_decoder(base, "f32")
    embedding = Dense(decoder.embedding.dequantize().clone())
    if decoder.head is not decoder.embedding:
        raise SystemExit("this benchmark wants a model whose head is its embedding, such as SmolLM2-135M")
    matrices = {name: linear.weight for name, linear in decoder.linears.items()}
    vectors = dict(decoder.named_buffers())
    return base.architecture, base.config, Frozen(matrices, vectors, embedding, embedding)


def padded(architecture: Architecture, config: ModelConfig, frozen: Frozen) -> tuple[ModelConfig, Frozen]:
    """The same function, WIDTH wide: zeros at the end of rows and columns, and whole heads of zeros.

    A norm over zeros too divides by less: its weight grows by sqrt(d / d'), and eps shrinks by d / d'.
    """
    share = config.hidden_size / WIDTH
    heads = WIDTH // config.head_dim
    kv_heads = heads * config.num_key_value_heads // config.num_attention_heads
    wide = replace(
        config, hidden_size=WIDTH, num_attention_heads=heads, num_key_value_heads=kv_heads,
        rms_norm_eps=config.rms_norm_eps * share,
    )  # fmt: skip
    shapes = architecture.layer_matrices(wide)
    matrices = {n: Dense(pad(w.dequantize(), shapes[n.split(".", 3)[-1]])) for n, w in frozen.matrices.items()}
    vectors = {name: pad(v[None], (1, WIDTH))[0] * share**0.5 for name, v in frozen.vectors.items()}
    embedding = Dense(pad(frozen.embedding.dequantize(), (config.vocab_size, WIDTH)))
    return wide, Frozen(matrices, vectors, embedding, embedding)


def pad(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, shape[1] - matrix.shape[1], 0, shape[0] - matrix.shape[0]))


def held(frozen: Frozen, how: str) -> dict[str, Weight]:
    """Every matrix of a dense float32 base in another way of `base/hold.py`."""
    return {
        name: hold(Stored(weight.dequantize().numpy().view(np.uint8), Type.F32, weight.shape[1]), how)
        for name, weight in frozen.matrices.items()
    }


def batch_of(config: ModelConfig, n_tokens: int) -> Batch:
    """A packed row of seeded ids, in examples of SEGMENT tokens."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, n_tokens)
    positions = np.arange(n_tokens) % SEGMENT
    learned = (positions >= SEGMENT * 2 // 3) & (positions < SEGMENT - 1)
    labels = np.where(learned, np.roll(ids, -1), IGNORE)
    starts = (*range(0, n_tokens, SEGMENT), n_tokens)
    return Batch(ids, positions, 0, starts, labels, n_tokens)


def measure(decoder: Decoder, ways: dict[str, dict[str, Weight]], batch: Batch, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step (forward, backward, AdamW) over each way in every round, each round begun by another way."""
    parameters = inject(decoder, "lora", RANK, ALPHA, seed=0)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, foreach=True)
    taken: dict[str, list[float]] = {how: [] for how in ways}
    for turn in range(rounds + 1):
        begin = turn % len(ways)
        for how, weights in [*ways.items()][begin:] + [*ways.items()][:begin]:
            for name, linear in decoder.linears.items():
                linear.weight = weights[name]
            start = time.perf_counter()
            torch.autograd.backward(token_nll(decoder, batch, 0.0).sum() / batch.n_loss_tokens)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken[how].append(time.perf_counter() - start)
    return {how: seconds[1:] for how, seconds in taken.items()}  # the first round warms up


def report(
    width: int, decoder: Decoder, frozen: Frozen, hows: tuple[str, ...], args: argparse.Namespace
) -> list[dict[str, object]]:
    ways = {how: held(frozen, how) for how in hows}
    seconds = measure(decoder, ways, batch_of(decoder.config, args.tokens), args.rounds)
    rows = []
    for how in hows:
        # of the steps of one round, which the machine slowed alike
        ratio = round(median(own / dense for own, dense in zip(seconds[how], seconds["f32"], strict=True)), 3)
        target = TARGETS.get(how)
        size = sum(weight.size_bytes for weight in ways[how].values()) / 1e6
        met = target is None or ratio <= target
        rows.append(
            {"width": width, "held": how, "seconds": median(seconds[how]), "ratio": ratio, "mb": size, "met": met}
        )
        goal = "| |" if target is None else f"| ≤ {target} | {'met' if met else 'NOT MET'} |"
        print(f"| {width} | {how} | {size:.0f} | {median(seconds[how]):.2f} | {ratio:.3f} {goal}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", type=Path, help="a GGUF of SmolLM2-135M; the quickstart's if it is not given")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(choose_products().value)
    if args.base is None:
        from edgelora.pipeline.quickstart import default_base

        args.base = default_base()
    architecture, config, frozen = floats_of(args.base)
    decoder = Decoder(architecture, config, frozen)
    wide, wide_frozen = padded(architecture, config, frozen)
    wide_decoder = Decoder(architecture, wide, wide_frozen)
    ids = torch.from_numpy(batch_of(config, 32).input_ids)
    torch.testing.assert_close(wide_decoder.logits(ids), decoder.logits(ids), atol=1e-3, rtol=1e-3)

    print(f"{processor_name()}, {args.threads} threads, {args.tokens} tokens, LoRA of rank {RANK} on every linear\n")
    print("| width | held as | MB | step, s | times float32 | target | |\n|---:|---|---:|---:|---:|---:|---|")
    rows = report(config.hidden_size, decoder, frozen, AS_IT_IS, args)
    rows += report(WIDTH, wide_decoder, wide_frozen, PADDED, args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"processor": processor_name(), "threads": args.threads, "tokens": args.tokens, "found": rows}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
