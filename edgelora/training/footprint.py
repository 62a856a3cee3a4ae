"""Where the memory of a training run goes, from dimensions alone: each part in bytes. Reads no weight.

Of the base `base_footprint.py` counts, of what is trained `adapter_footprint.py`, on a card `card_footprint.py`. What a
layer keeps is counted as `nn/` saves it (its docstrings say what); the last constants are measured on glibc.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod

from gguf.constants import GGMLQuantizationType as Type

from edgelora.config import TrainConfig
from edgelora.nn.attention import QUERY_TILE
from edgelora.nn.loss import VOCABULARY_ROWS, positions
from edgelora.peft.methods import METHODS
from edgelora.training.adapter_footprint import (
    adapted,
    adapter_numbers,
    held_beside,
    most_adapted,
    optimizer_bytes,
    trained_norms,
    trained_whole,
    trains_head,
    virtual_tokens,
)  # fmt: skip
from edgelora.training.base_footprint import Model, base_bytes

IMPORTS = 300_000_000  # a process with torch and an opened base, before any weight is read
CUDA_CONTEXT = 750_000_000  # what CUDA and its libraries take of a card: as measured on an NVIDIA H100, torch 2.11
FIRST_STEP = 50_000_000  # pages of libraries that it touches, and first holes
# What oneDNN keeps for shapes of products (nn/primitives.py), where these are not the compiled code's.
ONEDNN = 60_000_000
# Memory between live tensors that the allocator cannot hand out again, as a share of activations; more where tensors
# of two dtypes take turns in it (nn/scratch.py: room). Both as benchmarks/memory.py finds them.
LOST = {"cpu": {"f32": 0.0, "bf16": 0.28}, "cuda": {"f32": 0.1, "bf16": 0.1}, "mps": {"f32": 0.1, "bf16": 0.1}}


@dataclass(frozen=True)
class Load:
    """What a micro-batch is: its tokens, those of its longest row, and whether layers are computed again.

    recorded: whether passes over such ones are CUDA graphs.
    """

    tokens: int
    longest: int
    recompute: bool
    recorded: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes of each part at the peak of a step; `offloaded` lies in the machine's memory instead of the card's."""

    process: int
    base: int
    adapter: int
    gradients: int
    optimizer: int
    scratch: int
    logits: int
    activations: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device: without what is offloaded."""
        return sum(self.as_dict().values()) - self.offloaded

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def in_words(self) -> str:
        """`process 375, base 140, …`, in MB."""
        return ", ".join(f"{name} {n / 1e6:.0f}" for name, n in self.as_dict().items() if n)


def first_step(model: Model, config: TrainConfig) -> int:
    """What a process on a CPU takes once and for all when it computes for the first time."""
    return FIRST_STEP + (0 if config.dtype in model.faster else ONEDNN)


def kept_by_a_layer(model: Model, config: TrainConfig, copied: bool = True) -> int:
    """Bytes that the graph of one layer holds for each token until its backward pass.

    copied: of one product for queries, keys and values, the values alone are kept, as compiled attention reads them.
    """
    c, a, wide = model.config, model.architecture, 4 if config.dtype == "f32" else 2
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linears = most_adapted(model, config)
    norms, own = a.norms, {name.rpartition(".")[2] for name in trained_norms(model, config)}
    kept = 0
    for before, after in ((norms.before_attention, norms.after_attention), (norms.before_mlp, norms.after_mlp)):
        kept += (4 if before in own else wide) * d + (
            4 if before is not None else 0
        )  # the stream, or what is multiplied
        kept += wide * d + 4 if after is not None else 0
    kept += wide * (q + 2 * kv)
    if a.qk_norm is not None or (a.fused and not copied):
        kept += wide * (q + kv)  # as they were before norm or rotation
    kept += wide * q  # what attention gives: o_proj's input, and the compiled attention's own
    if (row := METHODS[config.method]).ranked:  # x Aᵀ, once for each pair of the file
        each = row.file_ranks if row.kept_ranks is None else row.kept_ranks
        kept += wide * each * sum(one.rank for one in linears)
    if row.keeps_answer:
        kept += wide * sum(one.shape[0] for one in linears)
    if a.experts is None:
        return kept + 2 * wide * c.intermediate_size
    chosen = c.num_experts_per_tok
    return kept + 4 * d + 8 * c.num_experts + chosen * (wide * (2 * c.moe_intermediate_size + 2 * d) + 24)


def in_passing(model: Model, config: TrainConfig, load: Load, device: str) -> int:
    """Bytes that a layer's backward pass needs for a moment: gradients, and values made again.

    Beside the gradient of the residual stream, whichever is more: a gated unit's (of its answer and its two halves),
    attention's (of what it reads and gives), or, before any layer, the hidden states at the end and theirs.
    """
    c, wide = model.config, 4 if config.dtype == "f32" else 2
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    ff = c.intermediate_size if model.architecture.experts is None else c.num_experts_per_tok * c.moe_intermediate_size
    with_compiled = model.attention_threads(device) > 0
    gated = 3 * wide * ff * load.tokens
    if model.architecture.fused:  # both halves are copied for compiled code, or their gradients put together
        gated += (2 if with_compiled else 1) * wide * ff * load.tokens
    attended = (wide * (2 * q + 2 * kv) + 8 * kv) * load.tokens
    if not with_compiled:  # torch rotates in float32
        attended = max(attended + tile_bytes(model, load), (wide * (2 * q + 2 * kv) + 8 * q) * load.tokens)
    return 4 * d * load.tokens + max(gated, attended, 3 * 4 * d * load.tokens)


def tile_bytes(model: Model, load: Load) -> int:
    """Scores, probabilities and their gradients of one tile of queries, in float32: attention through torch."""
    matrices = 4 if model.config.attn_logit_softcapping is None else 5
    return matrices * 4 * model.config.num_attention_heads * min(QUERY_TILE, load.longest) * load.longest


def attention_buffers(model: Model, load: Load, device: str) -> int:
    """What compiled attention keeps: of each thread five float32 matrices of its longest sequence (`attention_scratch`
    of kernels/attention.c), and the parts that threads have in the gradients of keys and values (nn/flash.py).
    """
    threads, c = model.attention_threads(device), model.config
    parts = 2 * (threads + c.num_key_value_heads - 1) * load.tokens
    return 4 * c.head_dim * (threads * 5 * load.longest + parts) if threads else 0


def scratch_bytes(model: Model, config: TrainConfig, tokens: int) -> int:
    """The buffers that weights are dequantized into (`base/weights.py`): for each dtype one, of the largest.

    With them one for the gradient that layers of one input sum up, whose weights are not there at once (`cpu_lora.py`).
    """
    (vocabulary, d), kind = model.head
    slice_of_head = min(vocabulary, VOCABULARY_ROWS) * d
    how, dtype, trained = config.base_dtype, config.dtype, trains_head(model, config)
    layers = [
        (prod(shape), kind if how == "blocks" else how)
        for name, (shape, kind) in model.matrices.items()
        if ".layers." in name
    ]
    largest = max((size for size, stored in layers if not model.is_factor(stored, dtype)), default=0)
    largest_f32 = max((size for size, stored in layers if not model.is_factor(stored, "f32")), default=0)
    through_f32 = how == "nf4" or METHODS[config.method].reads_float32
    logits = "bf16" if dtype == "bf16" and "bf16" in model.sums else "f32"
    of_head = trained or (logits == "f32" and not model.is_factor(kind, "f32"))
    wide = slice_of_head if kind != Type.F32 and of_head else 0
    wide = max(wide, largest_f32 if dtype == "f32" or through_f32 else 0)
    narrow = max(0 if model.is_factor(kind, "bf16") else slice_of_head, largest) if dtype == "bf16" else 0
    summed = tokens * d if largest and dtype in model.faster else 0
    return 4 * (wide + summed) + 2 * narrow + (4 * slice_of_head if trained else 0)


def remade_bytes(model: Model, config: TrainConfig) -> int:
    """Of the largest matrix that a method makes anew wherever it is read, such as a whole weight (`peft/remade.py`): in
    float32 and in the dtype of products, its gradient, and what the method's own are made of that with."""
    remakes = METHODS[config.method].remakes
    made = [prod(shape) for one in adapted(model, config).values() for shape in remakes(*one.shape, one.rank)]
    made += [prod(model.matrices[f"{name}.weight"][0]) for name in trained_whole(model, config).linears]
    return (12 if config.dtype == "f32" else 16) * max(made, default=0)


def logits_bytes(model: Model, config: TrainConfig, tokens: int) -> int:
    """Of the logits of as many rows as the fused loss has at once (`nn/loss.py`), whatever the micro-batch."""
    vocabulary = model.head[0][0]
    rows = positions(tokens, vocabulary, "cpu")
    capped = 2 if model.config.final_logit_softcapping is not None else 1
    narrow = 2 * rows * VOCABULARY_ROWS if config.dtype == "bf16" else 0
    return 4 * rows * vocabulary * capped + narrow


def activation_bytes(model: Model, config: TrainConfig, load: Load, device: str) -> tuple[int, int]:
    """What a micro-batch takes at the peak of its backward pass, and how much of it waits elsewhere (`offload`)."""
    copied = model.attention_threads(device) > 0
    layers, one = model.config.num_hidden_layers, kept_by_a_layer(model, config, copied)
    inputs = 4 * model.config.hidden_size * layers
    kept = (0 if config.offload else inputs) + one if load.recompute else layers * one
    moving = load.tokens * kept + in_passing(model, config, load, device)
    return int(moving * (1 + LOST[device][config.dtype])), load.tokens * inputs if config.offload else 0


def footprint(
    model: Model, config: TrainConfig, load: Load, device: str = "cpu", process: int | None = None
) -> Footprint:
    """Bytes of each part. `config` must be settled: dtype, base_dtype, rank. `process`: measured, if it is known."""
    n = virtual_tokens(config)
    load = replace(load, tokens=load.tokens + n, longest=load.longest + n)
    if device == "cuda":
        from edgelora.training.card_footprint import on_a_card  # which counts with what stands here

        return on_a_card(model, config, load, process)
    numbers = 4 * adapter_numbers(model, config)
    activations, offloaded = activation_bytes(model, config, load, device)
    fixed = IMPORTS if device == "cpu" else CUDA_CONTEXT
    return Footprint(
        process=(fixed if process is None else process) + (first_step(model, config) if device == "cpu" else 0),
        base=base_bytes(model, config.base_dtype),
        adapter=numbers * (2 if config.ema_decay else 1) + 4 * held_beside(model, config),
        gradients=numbers,
        optimizer=optimizer_bytes(model, config),
        scratch=scratch_bytes(model, config, load.tokens)
        + remade_bytes(model, config)
        + attention_buffers(model, load, device),
        logits=logits_bytes(model, config, load.tokens),
        activations=activations,
        offloaded=offloaded,
    )
