"""What is known of a way to adapt a base: a row of METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from edgelora.architectures.config import ModelConfig
from edgelora.nn.linear import Delta, Linear, Weight
from edgelora.nn.virtual import Before
from edgelora.peft.around import NOTHING, Around
from edgelora.peft.defaults import LORA, Defaults
from edgelora.peft.virtual_settings import VirtualTokens

Shapes = tuple[tuple[int, ...], ...]


def no_layer(*_: object) -> Delta:
    """Nobody calls it: what a method that adapts no linear layer would make of one."""
    raise NotImplementedError("it adapts no linear layer")


def pair(d_out: int, d_in: int, rank: int) -> Shapes:
    """A and B of a LoRA."""
    return (rank, d_in), (d_out, rank)


def whole(d_out: int, d_in: int, _: int) -> Shapes:
    """A weight."""
    return ((d_out, d_in),)


def nothing(*_: int) -> Shapes:
    """No matrix."""
    return ()


@dataclass(frozen=True)
class Method:
    """A way to adapt linear layers, norms or both, or to put something before every sequence.

    `fresh(weight, rank, alpha, generator)` makes the trainable half of a linear layer; of a norm it is the new weight.
    """

    name: str
    paper: str
    trains: str
    exits: tuple[str, ...]
    fresh: Callable[[Weight, int, float, torch.Generator], Delta] = no_layer
    defaults: Defaults = LORA
    """Its rank, α and learning rate where nobody says."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What PEFT's adapter_config.json says of it, beyond a LoRA."""
    more_settings: Callable[[Mapping[str, Delta], Sequence[str]], Mapping[str, object]] = lambda *_: {}
    """The same by what it trained: the deltas by their layers' names, and PEFT's target_modules."""
    faster: tuple[str, ...] = ()
    """The tensors that learn `loraplus_ratio` times faster than the others."""
    shapes: Callable[[int, int, int], Shapes] = pair
    """`shapes(d_out, d_in, rank)`: of what is trained for one linear layer."""
    held: int = 0
    """How many pairs A and B are held beside what is trained: a start that stays, copies for the backward pass."""
    kept_ranks: int | None = None
    """How many numbers of each rank and token are kept for the backward pass, where these are not `file_ranks`."""
    keeps_answer: bool = False
    """Whether it keeps what an adapted layer answers (d_out) of each token for the backward pass."""
    reads_float32: bool = False
    """Whether it reads W in float32, whatever the dtype of products."""
    remakes: Callable[[int, int, int], Shapes] = nothing
    """The matrix that is made anew wherever it is read, of float32 and as it is multiplied; see `remade.py`."""
    projects: bool = False
    """Whether its optimizer is GaLore's, whose rank and α these are."""
    around: Around = NOTHING
    """What it does beside the optimizer's steps."""
    together: Callable[[Sequence[Weight], int, float, torch.Generator], Sequence[Delta]] | None = None
    """In the place of `fresh` for all layers at once, where they share something."""
    from_original: Callable[[Weight, torch.Tensor, int, float, torch.Generator], Delta] | None = None
    """In the place of `fresh` where the weight (d_out, d_in) stands beside it that the base's was quantized from."""
    of_layer: Callable[[str, Linear], Delta] | None = None
    """In the place of `fresh` where it matters which layer it is: its HF name, and the layer."""
    with_bias: Callable[[Delta, Linear], None] | None = None
    """What a fresh delta gets besides where its layer has a bias."""
    shapes_of: Callable[[str, int, int], Shapes] | None = None
    """In the place of `shapes` where it matters which layer it is."""
    dense: bool = False
    """Whether the base's weights must be floats."""
    linears: bool = True
    """Whether it adapts linear layers."""
    norms: bool = False
    """Whether it trains the weights of norms."""
    vocabularies: tuple[str, ...] = ()
    """The embedding and the head, by HF's names, where it trains them whole; of a base with one matrix for both, that.
    """
    targets: tuple[str, ...] = ()
    """The layers that it adapts where nobody says which, as far as the model has them; empty: all."""
    ranked: bool = True
    """Whether it has a rank and an α."""
    rows: bool = False
    """Whether it trains the rows of some tokens in the embedding and the head, and no layer."""
    groups: bool = False
    """Whether attention is cut into shifted groups of tokens while it learns."""
    waits: bool = False
    """Whether it acts from an invocation on, not from the first token."""
    drops: str = ""
    """What PEFT calls the share of x that its A does not see while it learns; empty where no A sees x alone."""
    starts_in_weight: bool = False
    """Whether A and B begin as a part of the weight, which the base keeps and they take away again: all of it, also of
    what A does not see of x."""
    repeats: bool = False
    """Whether a pass with it launches the same for any row, over nothing but two matrices for each layer."""
    peft_type: str = "LORA"
    """What PEFT calls it; a method that PEFT lacks is EDGELORA (see `peft/kinds.py`)."""
    before: Callable[[ModelConfig, VirtualTokens], Before] | None = None
    """In the place of all that: the virtual tokens that it trains."""
    virtual: tuple[str, ...] = ()
    """The settings of `VirtualTokens` that it has a use for."""
    file_ranks: int = 1
    """The rank of the LoRA that it leaves as, in ranks of what was trained."""
    leaves_weights: bool = False
    """Whether it leaves as what is added to whole weights, as large as these."""

    @property
    def trains_weights(self) -> bool:
        """Whether what is trained are whole weights."""
        return self.shapes is whole

    def trained(self, module: str, d_out: int, d_in: int, rank: int) -> Shapes:
        """The shapes of what is trained for the linear layer of this name."""
        return self.shapes(d_out, d_in, rank) if self.shapes_of is None else self.shapes_of(module, d_out, d_in)
