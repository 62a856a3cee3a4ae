"""What a base takes in memory, from its dimensions and how it is held: reads no weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgelora.architectures import Architecture, ModelConfig
from edgelora.architectures.layers import Layers
from edgelora.architectures.names import EMBEDDING, HEAD, tensor_shapes
from edgelora.base.hold import BLOCKS, FALLBACK, FLOATS
from edgelora.base.model import Base
from edgelora.device import compute_threads
from edgelora.kernels import load as kernels
from edgelora.nn import products
from edgelora.nn.compiled import LANES

Type = GGMLQuantizationType
Shape = tuple[int, int]

NF4_BITS = 4.127


def compiled_threads() -> int:
    """How many threads run the code of `kernels/` on this CPU; 0 where it was not compiled, and torch does its work."""
    return 0 if kernels.library() is None else compute_threads()


def summed() -> frozenset[str]:
    """The dtypes of which the compiled code sums products on this CPU (nn/products.py), by their names in a config."""
    return frozenset(name for name, dtype in FLOATS.items() if products.exist(dtype))


def summed_faster() -> frozenset[str]:
    """Those of which it sums them faster than torch: a LoRA's are torch's otherwise."""
    return frozenset(name for name, dtype in FLOATS.items() if products.are_faster(dtype))


@dataclass(frozen=True, eq=False)
class Model:
    """A base as far as memory goes: its matrices with shape and stored type, and its vectors' numbers.

    shares: how many processes hold the layers together (`--shard-base`, see `sharding.py`); this is one of them.
    threads: of the compiled code, should it compute on a CPU (see `compiled_threads`).
    sums, faster: of which dtypes that sums products, and of which a LoRA's.
    """

    architecture: Architecture
    config: ModelConfig
    matrices: Mapping[str, tuple[Shape, Type]]
    n_vector: int
    biased: tuple[str, ...] = ()
    """The layers that have a bias, by their names in a block."""
    shares: int = 1
    threads: int = field(default_factory=compiled_threads)
    sums: frozenset[str] = field(default_factory=summed)
    faster: frozenset[str] = field(default_factory=summed_faster)

    @classmethod
    def of(cls, base: Base) -> Model:
        shapes = tensor_shapes(base.architecture, base.config, base.biased)
        return cls(
            base.architecture, base.config,
            {n: ((s[0], s[1]), base.tensors.kind(n)) for n, s in shapes.items() if len(s) == 2},
            sum(prod(s) for s in shapes.values() if len(s) == 1), base.biased,
        )  # fmt: skip

    @classmethod
    def stored_as(cls, architecture: Architecture, config: ModelConfig, kind: Type) -> Model:
        """A model with these dimensions, all of whose matrices are stored as `kind`."""
        shapes = tensor_shapes(architecture, config)
        matrices = {n: ((s[0], s[1]), kind) for n, s in shapes.items() if len(s) == 2}
        return cls(architecture, config, matrices, sum(prod(s) for s in shapes.values() if len(s) == 1))

    @cached_property
    def layers(self) -> Layers:
        """What of it adapters may change."""
        return Layers.of(self.architecture, self.config, self.biased)

    @property
    def n_weights(self) -> int:
        """Numbers of all matrices and vectors."""
        return sum(prod(shape) for shape, _ in self.matrices.values()) + self.n_vector

    def attention_threads(self, device: str) -> int:
        """How many compute attention in compiled code, as nn/flash.py can; 0: torch does, tile by tile."""
        return self.threads if device == "cpu" and self.config.head_dim % LANES == 0 else 0

    def is_factor(self, stored: str | Type, dtype: str) -> bool:
        """Whether a weight stays as it is stored where products of `dtype` read it (nn/products.py)."""
        name = {Type.F32: "f32", Type.BF16: "bf16"}.get(stored) if isinstance(stored, Type) else stored
        return name == dtype or (name == "bf16" and dtype in self.sums)

    @property
    def head(self) -> tuple[Shape, Type]:
        """Shape and stored type of what makes logits: the embedding where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.matrices[f"{EMBEDDING if tied else HEAD}.weight"]


def stored_bytes(shape: Shape, kind: Type) -> int:
    """Of a matrix as a file stores it."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    return prod(shape) // per_block * block_bytes


def held_bytes(shape: Shape, kind: Type, how: str) -> int:
    """What `base/hold.py` keeps of a matrix."""
    if how == "blocks":
        return stored_bytes(shape, kind)
    if how == "nf4":
        return int(prod(shape) * NF4_BITS / 8)
    if how in FLOATS:
        return prod(shape) * FLOATS[how].itemsize
    kind = BLOCKS[how]
    kind = FALLBACK.get(kind, kind) if shape[1] % GGML_QUANT_SIZES[kind][0] else kind
    return 2 * prod(shape) if shape[1] % GGML_QUANT_SIZES[kind][0] else stored_bytes(shape, kind)


def base_bytes(model: Model, how: str, device: str = "cpu") -> int:
    """All weights as they are held; embedding and head stay as they are stored. Rotary rows of a GGUF are copies.

    An embedding beside a head stays with the machine where a CUDA card computes (`base/host_rows.py`).

    Of layers that are dealt out one share, and the buffer in which one of them is put together.
    """
    layers: dict[str, int] = {}
    total = 4 * model.n_vector
    on_host = device == "cuda" and model.shares == 1 and not model.config.tie_word_embeddings
    for name, (shape, kind) in model.matrices.items():
        if on_host and name == f"{EMBEDDING}.weight":
            continue
        if name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
            total += stored_bytes(shape, kind)
        else:
            layer = name.partition(".layers.")[2].partition(".")[0]
            layers[layer] = layers.get(layer, 0) + held_bytes(shape, kind, how)
    if model.shares == 1:
        return total + sum(layers.values())
    return total + sum(-(-n // model.shares) for n in layers.values()) + max(layers.values())
