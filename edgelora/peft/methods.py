"""THE TABLE of methods: what each trains and which doors lead out of it (DESIGN: exits)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from edgelora.architectures.config import ModelConfig
from edgelora.nn.linear import Delta, Linear, Weight
from edgelora.nn.virtual import Before
from edgelora.peft import (
    adalora,
    alora,
    bitfit,
    dora,
    dylora,
    full,
    galore,
    glora,
    houlsby,
    ia3,
    layernorm,
    loftq,
    longlora,
    lora,
    lora_xs,
    lorma,
    lors,
    molora,
    multilora,
    olora,
    p_tuning,
    pissa,
    prefix_tuning,
    prompt_tuning,
    replora,
    rslora,
    vera,
)
from edgelora.peft.around import NOTHING, Around
from edgelora.peft.kinds import NATIVE_TYPE
from edgelora.peft.virtual_settings import VirtualTokens

Shapes = tuple[tuple[int, ...], ...]


def no_layer(*_: object) -> Delta:
    """What a method that changes none makes of a linear layer."""
    raise NotImplementedError("it changes no layer")


def pair(d_out: int, d_in: int, rank: int) -> Shapes:
    """A and B of a LoRA."""
    return (rank, d_in), (d_out, rank)


def whole(d_out: int, d_in: int, _: int) -> Shapes:
    """A weight."""
    return ((d_out, d_in),)


@dataclass(frozen=True)
class Method:
    """A way to adapt linear layers, norms or both, or to put something before every sequence.

    `fresh(weight, rank, alpha, generator)` makes the trainable half of a linear layer; of a norm it is the new weight.
    """

    name: str
    paper: str
    trains: str
    exits: tuple[str, ...]
    fresh: Callable[[Weight, int, float, torch.Generator], Delta]
    settings: Mapping[str, object] = field(default_factory=dict)
    """What PEFT's adapter_config.json says of it, beyond a LoRA."""
    faster: tuple[str, ...] = ()
    """The tensors that learn `loraplus_ratio` times faster than the others."""
    shapes: Callable[[int, int, int], Shapes] = pair
    """`shapes(d_out, d_in, rank)`: of what is trained for one linear layer."""
    held: int = 0
    """How many pairs A and B are held beside what is trained: a start that stays, copies for the backward pass."""
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
    drops: bool = False
    """Whether PEFT's lora_dropout can stand before its A."""
    peft_type: str = "LORA"
    """What PEFT calls it; a method that PEFT lacks is EDGELORA (see `peft/kinds.py`)."""
    before: Callable[[ModelConfig, VirtualTokens], Before] | None = None
    """In the place of all that: the virtual tokens that it trains."""
    virtual: tuple[str, ...] = ()
    """The settings of `VirtualTokens` that it has a use for."""
    file_ranks: int = 1
    """The rank of the LoRA that it leaves as, in ranks of what was trained."""

    def trained(self, module: str, d_out: int, d_in: int, rank: int) -> Shapes:
        """The shapes of what is trained for the linear layer of this name."""
        return self.shapes(d_out, d_in, rank) if self.shapes_of is None else self.shapes_of(module, d_out, d_in)


METHODS: dict[str, Method] = {
    "lora": Method(
        name="lora",
        paper="arXiv:2106.09685",
        trains="A (r, d_in) and B (d_out, r) for each linear layer",
        exits=("adapter", "merged"),
        fresh=lora.fresh,
        drops=True,
    ),
    "rslora": Method(
        name="rslora",
        paper="arXiv:2312.03732",
        trains="A and B, scaled by α/√r",
        exits=("adapter", "merged"),
        fresh=rslora.fresh,
        drops=True,
        settings={"use_rslora": True},
    ),
    "loraplus": Method(
        name="loraplus",
        paper="arXiv:2402.12354",
        trains="A and B, B with a higher learning rate",
        exits=("adapter", "merged"),
        fresh=lora.fresh,
        drops=True,
        faster=("lora_B",),
    ),
    "dora": Method(
        name="dora",
        paper="arXiv:2402.09353",
        trains="A, B and the length m (d_out,) of each row of the adapted weight",
        exits=("patched", "merged"),  # llama.cpp adds B A x to W x, and has no place for a factor on the sum
        fresh=dora.fresh,
        settings={"use_dora": True},
        shapes=lambda d_out, d_in, rank: (*pair(d_out, d_in, rank), (d_out,)),
    ),
    "pissa": Method(
        name="pissa",
        paper="arXiv:2404.02948",
        trains="A and B, from the r largest singular values and vectors of the weight; the base keeps its own",
        exits=("adapter", "merged"),
        fresh=pissa.fresh,
        held=3,
        file_ranks=2,
    ),
    "olora": Method(
        name="olora",
        paper="arXiv:2406.01775",
        trains="A and B, from the QR decomposition of the weight; the base keeps its own",
        exits=("adapter", "merged"),
        fresh=olora.fresh,
        held=3,
        file_ranks=2,
    ),
    "loftq": Method(
        name="loftq",
        paper="arXiv:2310.08659",
        trains="A and B, from what quantization took away of the weight; the base stays quantized as it is",
        exits=("adapter", "merged"),
        fresh=lora.fresh,  # of a base that is not quantized nothing was taken away
        drops=True,
        from_original=loftq.from_original,
    ),
    "lora_xs": Method(
        name="lora_xs",
        paper="arXiv:2405.17604",
        trains="R (r, r), between the r leading singular vectors of the weight",
        exits=("adapter", "merged"),
        fresh=lora_xs.fresh,
        shapes=lambda _d_out, _d_in, rank: ((rank, rank),),
        held=2,
    ),
    "lorma": Method(
        name="lorma",
        paper="arXiv:2506.07621",
        trains="A (r, d_out) and B (d_out, r), whose product multiplies the weight",
        exits=("adapter", "merged"),
        fresh=lorma.fresh,
        shapes=lambda d_out, _, rank: pair(d_out, d_out, rank),
        held=1,
    ),
    "replora": Method(
        name="replora",
        paper="arXiv:2502.03044",
        trains="P (r, r), and two networks of r hidden units that make A and B of it",
        exits=("adapter", "merged"),
        fresh=replora.fresh,
        shapes=lambda d_out, d_in, rank: ((rank, d_in), (rank, d_out), *3 * ((rank, rank),), *2 * ((rank,),)),
        held=1,
    ),
    "multilora": Method(
        name="multilora",
        paper="arXiv:2311.11501",
        trains=f"A and B, as {multilora.PARALLEL} LoRAs that share the rank, and a factor (d_out,) for each",
        exits=("adapter", "merged"),
        fresh=multilora.fresh,
        shapes=lambda d_out, d_in, rank: (*pair(d_out, d_in, rank), (min(multilora.PARALLEL, rank), d_out)),
        held=1,
    ),
    "vera": Method(
        name="vera",
        paper="arXiv:2310.11454",
        trains="d (r) and b (d_out), which scale two random matrices that all layers share",
        exits=("adapter", "merged"),
        fresh=vera.fresh,
        together=vera.together,
        peft_type="VERA",
        settings={
            "projection_prng_key": 0,
            "save_projection": True,
            "vera_dropout": 0.0,
            "d_initial": vera.D_START,
        },
        shapes=lambda d_out, _, rank: ((d_out,), (rank,)),
        held=1,
    ),
    "dylora": Method(
        name="dylora",
        paper="arXiv:2210.07558",
        trains="A and B, their first b ranks with each micro-batch, so that any first b are an adapter too",
        exits=("adapter", "merged"),
        fresh=dylora.fresh,
        around=dylora.Nested(),
    ),
    "adalora": Method(
        name="adalora",
        paper="arXiv:2303.10512",
        trains="P, λ and Q; ranks move to where they count: 1.5 r at first, r on average in the end",
        exits=("adapter", "merged"),
        fresh=adalora.fresh,
        around=adalora.Budget(),
        shapes=lambda d_out, d_in, rank: (
            *pair(d_out, d_in, adalora.ranks_at_first(rank)),
            (adalora.ranks_at_first(rank), 1),
        ),
        held=5,
    ),
    "alora": Method(
        name="alora",
        paper="arXiv:2504.12397",
        trains="A and B, which act from an invocation in the prompt on: before it all is the base's",
        exits=("adapter",),  # a weight is the same for every token
        fresh=alora.fresh,
        waits=True,
    ),
    "longlora": Method(
        name="longlora",
        paper="arXiv:2309.12307",
        trains="A and B, and the norms' weights, while tokens attend to groups alone; not the embeddings",
        exits=("patched", "merged"),
        fresh=longlora.fresh,
        norms=True,
        groups=True,
        drops=True,
        settings={"modules_to_save": ["norm"]},  # PEFT's: all whose names end so
    ),
    "full": Method(
        name="full",
        paper="arXiv:1801.06146",
        trains="W (d_out, d_in) of every linear layer and the norms, as what is added to them; not the embeddings",
        exits=("merged",),
        fresh=full.fresh,
        shapes=whole,
        dense=True,
        norms=True,
        peft_type=NATIVE_TYPE,
        ranked=False,
    ),
    "galore": Method(
        name="galore",
        paper="arXiv:2403.03507",
        trains="what full fine-tuning does, with Adam's moments of r directions of each gradient",
        exits=("merged",),
        fresh=galore.fresh,
        shapes=whole,
        dense=True,
        norms=True,
        peft_type=NATIVE_TYPE,
        file_ranks=0,  # it is no LoRA: its rank is the optimizer's
    ),
    "lors": Method(
        name="lors",
        paper="arXiv:2501.08582",
        trains="A and B, whose product is added where the weight is not zero: a pruned model stays one",
        exits=("merged",),
        fresh=lors.fresh,
        dense=True,
        peft_type=NATIVE_TYPE,
        file_ranks=0,
    ),
    "glora": Method(
        name="glora",
        paper="arXiv:2306.07967",
        trains="two LoRAs, one added to the weight and one that multiplies its elements; biases where there are any",
        exits=("merged",),
        fresh=glora.fresh,
        with_bias=glora.and_bias,
        shapes=lambda d_out, d_in, rank: 2 * pair(d_out, d_in, rank),
        peft_type="GLORA",
        settings={"config_A_B": "lora", "config_C": "vector", "config_D_E": "vector", "init_weights": True},
        file_ranks=0,
    ),
    "ia3": Method(
        name="ia3",
        paper="arXiv:2205.05638",
        trains="a factor for each row of k and v (d_out,), and for each column of down (d_in,)",
        exits=("patched", "merged"),
        fresh=ia3.fresh,
        of_layer=ia3.of_layer,
        peft_type="IA3",
        shapes=lambda d_out, _d_in, _rank: ((d_out, 1),),
        shapes_of=ia3.shapes,
        targets=ia3.TARGETS,
        ranked=False,
    ),
    "bitfit": Method(
        name="bitfit",
        paper="arXiv:2106.10199",
        trains="a bias (d_out,) of each linear layer, beside its own",
        exits=("patched", "merged"),
        fresh=bitfit.fresh,
        peft_type=NATIVE_TYPE,
        shapes=lambda d_out, _d_in, _rank: ((d_out,),),
        ranked=False,
    ),
    "layernorm": Method(
        name="layernorm",
        paper="arXiv:2312.11420",
        trains="the weights (d,) of all norms",
        exits=("patched", "merged"),
        fresh=layernorm.no_linear,
        linears=False,
        norms=True,
        peft_type="LN_TUNING",
        shapes=lambda *_: (),
        ranked=False,
    ),
    "houlsby": Method(
        name="houlsby",
        paper="arXiv:1902.00751",
        trains="D (r, d_out) and U (d_out, r) with a gelu between them, and their biases, behind o and down",
        exits=(),  # a gelu of what a layer answers is in no weight
        fresh=houlsby.fresh,
        peft_type=NATIVE_TYPE,
        shapes=houlsby.shapes,
        targets=houlsby.TARGETS,
    ),
    "molora": Method(
        name="molora",
        paper="arXiv:2309.05444",
        trains=f"A and B, as {molora.EXPERTS} LoRAs that share the rank, and a router that weighs them for each token",
        exits=(),  # llama.cpp adds an adapter with one weight for all tokens
        fresh=molora.fresh,
        peft_type=NATIVE_TYPE,
        shapes=molora.shapes,
    ),
    "token_rows": Method(
        name="token_rows",
        paper="PEFT's TrainableTokens",
        trains="the rows (d,) of some tokens in the embedding, and in a head of its own",
        exits=("adapter", "merged"),  # a LoRA of one-hot rows, where the head is its own
        fresh=no_layer,
        rows=True,
        peft_type="TRAINABLE_TOKENS",
        linears=False,
        ranked=False,
    ),
    "prompt_tuning": Method(
        name="prompt_tuning",
        paper="arXiv:2104.08691",
        trains="n embeddings (n, d), which stand before every prompt",
        exits=("soft prompt",),
        fresh=no_layer,
        before=prompt_tuning.PromptEmbedding,
        virtual=("num_virtual_tokens", "prompt_tuning_init"),
        peft_type="PROMPT_TUNING",
        linears=False,
        ranked=False,
    ),
    "p_tuning": Method(
        name="p_tuning",
        paper="arXiv:2103.10385",
        trains="n embeddings, and an MLP or LSTM that makes of them what stands before every prompt",
        exits=("soft prompt",),
        fresh=no_layer,
        before=p_tuning.PromptEncoder,
        virtual=("num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size"),
        peft_type="P_TUNING",
        linears=False,
        ranked=False,
    ),
    "prefix_tuning": Method(
        name="prefix_tuning",
        paper="arXiv:2101.00190",
        trains="n keys and values (n, layers, 2, KV, d_head) before every prompt",
        exits=("soft prompt",),
        fresh=no_layer,
        before=prefix_tuning.PrefixEncoder,
        virtual=("num_virtual_tokens", "prompt_tuning_init", "encoder_hidden_size", "prefix_projection"),
        peft_type="PREFIX_TUNING",
        linears=False,
        ranked=False,
    ),
}
