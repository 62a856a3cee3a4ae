"""What of a model an adapter may change: its linear layers, norms, embedding, head and biases, by HF's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.architectures.names import EMBEDDING, HEAD, is_norm, linear_modules, tensor_shapes


@dataclass(frozen=True)
class Layers:
    """(d_out, d_in) of linear layers, the widths of norms, (V, d) of the embedding and of a head of its own; and the
    layers with a bias by their names in a block (`self_attn.q_proj`)."""

    linears: Mapping[str, tuple[int, int]]
    norms: Mapping[str, int] = field(default_factory=dict)
    vocabularies: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    biased: Collection[str] = ()

    @classmethod
    def of(cls, architecture: Architecture, config: ModelConfig, biased: Collection[str] = ()) -> Layers:
        """Of a model with these dimensions."""
        shapes, both = tensor_shapes(architecture, config), (EMBEDDING, HEAD)
        return cls(
            linear_modules(architecture, config),
            {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if is_norm(name)},
            {name: (config.vocab_size, config.hidden_size) for name in both if f"{name}.weight" in shapes},
            biased,
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The vocabularies; of a base with one matrix for both PEFT saves that twice."""
        both = dict.fromkeys((EMBEDDING, HEAD), next(iter(self.vocabularies.values()))) if self.vocabularies else {}
        return both | dict(self.vocabularies)

    @property
    def tied(self) -> bool:
        """Whether one matrix is embedding and head."""
        return EMBEDDING in self.vocabularies and HEAD not in self.vocabularies
