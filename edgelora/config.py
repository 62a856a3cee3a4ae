"""Settings of a training run, checked when they are made. None where a setting is chosen from the base and the data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from edgelora.errors import ConfigError
from edgelora.faults import in_words

Method = Literal[
    "lora", "rslora", "loraplus", "dora", "pissa", "olora", "lora_xs", "multilora", "vera", "dylora",
    "adalora", "loftq", "lorma", "lorma_pi", "replora", "full", "galore", "lors", "glora",
    "alora", "longlora", "token_rows", "ia3", "bitfit", "layernorm", "houlsby", "molora", "prompt_tuning",
    "p_tuning", "prefix_tuning",
]  # fmt: skip
Objective = Literal["sft", "dpo", "ipo", "orpo", "kto"]
Optimizer = Literal["adamw", "adamw8bit", "adafactor", "lion"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
BaseDtype = Literal[
    "auto", "blocks", "nf4", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


class Source(NamedTuple):
    """A file or folder of rows, and how often each of its rows is seen in an epoch: 2 is twice, 0.5 a random half."""

    path: Path
    weight: float = 1.0

    def __str__(self) -> str:
        if self.weight == 1.0 and _source(str(self.path)) == self:
            return str(self.path)
        short = f"{self.weight:g}"
        return f"{self.path}:{short if float(short) == self.weight else self.weight}"


def _source(value: Any) -> Source:
    """`rows.jsonl` or `rows.jsonl:0.5`."""
    if isinstance(value, Source):
        return value
    if not isinstance(value, str | Path):
        raise ValueError(f"{value!r} is no path; a weight stands behind one, as in rows.jsonl:0.5")
    path, colon, number = str(value).rpartition(":")
    try:
        source = Source(Path(path), float(number)) if colon and path else Source(Path(value))
    except ValueError:
        source = Source(Path(value))  # a path with a colon in it
    if not 0 < source.weight <= 1000:
        raise ValueError(f"the weight of {source.path} is {source.weight:g}, it must lie between 0 and 1000")
    return source


def _sources(value: Any) -> Any:
    """One source or several."""
    several = isinstance(value, list | tuple) and not isinstance(value, Source)
    return tuple(_source(one) for one in (value if several else [value]))


Sources = Annotated[
    tuple[Source, ...], BeforeValidator(_sources), PlainSerializer(lambda sources: [str(source) for source in sources])
]


class Pattern(NamedTuple):
    """A rank or α for the layers whose names end as the regular expression `layers` says: `q_proj=4`."""

    layers: str
    value: float

    def __str__(self) -> str:
        return f"{self.layers}={int(self.value) if self.value.is_integer() else self.value}"


def _pattern(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    layers, _, number = str(value).rpartition("=")
    try:
        pattern = Pattern(layers, float(number))
    except ValueError as e:
        raise ValueError(f"{value} is no NAME=NUMBER, such as q_proj=4") from e
    if not layers or not 0 < pattern.value <= 1e6:
        raise ValueError(f"{value} is no NAME=NUMBER with a number above 0")
    return pattern


def _patterns(value: Any) -> Any:
    """One pattern or several, or a table of them."""
    if isinstance(value, Mapping):
        return tuple(_pattern(f"{layers}={number}") for layers, number in value.items())
    several = isinstance(value, list | tuple) and not isinstance(value, Pattern)
    return tuple(_pattern(one) for one in (value if several else [value]))


Patterns = Annotated[
    tuple[Pattern, ...], BeforeValidator(_patterns), PlainSerializer(lambda several: [str(one) for one in several])
]


def _ranks(patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    if odd := [str(one) for one in patterns if not (one.value.is_integer() and one.value <= 1024)]:
        raise ValueError(f"{', '.join(odd)}: a rank is a whole number from 1 to 1024")
    return patterns


def _names(value: Any) -> Any:
    """One name or several."""
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


def _named(path: Path) -> Path:
    if path.name in ("", ".."):
        raise ValueError(f"{str(path)!r} has no name that a folder beside it could share")
    return path


class TrainConfig(BaseModel):
    """What `edgelora train` does. Called with what cannot be, or with unknown settings, it raises ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # mypy has one with the type of each field

        @wraps(BaseModel.__init__)  # with pydantic's mark of it: `model_validate` goes its own way, and raises its own
        def __init__(self, /, **settings):
            try:
                super().__init__(**settings)
            except ValidationError as e:
                raise ConfigError(
                    what="; ".join(f"{fault['loc'][0]}: {in_words(TrainConfig, fault)}" for fault in e.errors()),
                    why="these settings cannot train anything",
                    fix="`edgelora train --print-config` prints each setting with what it is",
                ) from e

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is none of its values")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written_down(cls, value: Any) -> Any:
        """run.json and each checkpoint say what was asked for, in UTF-8."""
        for text in value if isinstance(value, list | tuple) else (value,):
            try:
                str(text).encode()
            except UnicodeEncodeError as e:
                raise ValueError(f"{str(text)!a} is not in UTF-8: rename it") from e
        return value

    base: Path
    """The base model: a .gguf file, or a Hugging Face folder."""
    data: Sources = Field(min_length=1)
    """Rows to learn: files or folders, each with `:weight` behind it where they are mixed."""
    out: Annotated[Path, AfterValidator(_named)]
    """The folder that the adapter becomes. What belongs to the run stands beside it, in OUT.run."""
    valid: Path | None = None
    """Held-out rows: their loss is measured every `eval_every` steps and at the end."""

    # -- the data
    data_format: str = "auto"
    """How rows are read: `auto` recognises each by its keys (see DATA_FORMATS in data/formats.py)."""
    loss_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learned: every one, or the last of each conversation."""
    truncate: bool = False
    """Cut rows that are longer than max_length (whole turns where that is possible) instead of refusing them."""
    max_length: int | None = Field(None, ge=8)
    """The longest row allowed, in tokens. None: what the memory plan allows, at most the base's context."""
    chat_template: str | None = None
    """For a base that has no chat template: `chatml`, or the path of a Jinja file. It travels with the adapter."""

    # -- the adapter
    method: Method = "lora"
    """How the base is adapted; `edgelora methods` lists what each of them trains and where its adapter can go."""
    original: Path | None = None
    """LoftQ: the 16-bit model that the base was quantized from, a .gguf file or a Hugging Face folder."""
    orthogonal_to: tuple[Path, ...] = ()
    """Earlier adapters of this base: the rows of A begin orthogonal to theirs (O-LoRA)."""
    rank: int | None = Field(None, ge=1, le=1024)
    """Rank r of the adapter."""
    alpha: float | None = Field(None, gt=0)
    """α: the adapter is scaled by α/r (rsLoRA: α/√r)."""
    target_modules: Names = ()
    """The layers that are adapted, by the ends of their names (`q_proj`, `down_proj` …), or one regular expression for
    whole names. Empty, or `all-linear`: all that the method adapts."""
    exclude_modules: Names = ()
    """Layers that are not adapted, said in the same way."""
    layers_to_transform: tuple[int, ...] = ()
    """The numbers of the decoder layers that are adapted, from 0. Empty: all of them."""
    rank_pattern: Annotated[Patterns, AfterValidator(_ranks)] = ()
    """Other ranks for some layers: `q_proj=4`, or a regular expression for the end of a name in front of the `=`."""
    alpha_pattern: Patterns = ()
    """Other α for some layers, said in the same way."""
    use_rslora: bool = False
    """Scale by α/√r instead of α/r, whatever the method (`--method rslora` is a LoRA with this)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """While it is trained, the share of each adapted layer's input that its A does not see. Not of every method."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """PEFT's: the biases that are trained beside A and B, of those that a model has: `all`, or those of adapted layers.
    """
    modules_to_save: Names = ()
    """PEFT's: layers that are trained whole beside A and B, by how their names end: `norm`, `embed_tokens`, `lm_head`,
    and linear layers over a base of floats. Matrices learn at a tenth of the learning rate."""
    invocation: str | None = Field(None, min_length=1)
    """aLoRA: the text from whose last place in a prompt on the adapter acts. None: what the chat template writes before
    an answer."""
    alora_invocation_tokens: tuple[int, ...] = ()
    """PEFT's: the same as token ids."""
    train_tokens: tuple[str, ...] = ()
    """Token rows: the tokens to train, by their texts (`<|reserved_1|>`) or ids."""
    group_size: int | None = Field(None, ge=2)
    """LongLoRA: how many tokens attend to each other while it learns. None: a quarter of max_length, the authors'."""
    num_virtual_tokens: int = Field(20, ge=1, le=1024)
    """Prompt, P- and prefix tuning: how many virtual tokens stand before every prompt. Beyond 20 they gain little
    (arXiv:2104.08691, section 3.2)."""
    prompt_tuning_init: Literal["sample_vocab", "text", "random"] | None = None
    """As what they begin: as tokens drawn from the vocabulary, as those of prompt_tuning_init_text, or at random. None:
    as the text or drawn tokens where a method can begin as real ones, which learns faster."""
    prompt_tuning_init_text: str | None = Field(None, min_length=1)
    """The text as which they begin, its tokens repeated or cut to num_virtual_tokens."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """P-tuning: what makes the embeddings while they are trained."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """P-tuning, and prefix tuning with a projection: hidden units of what makes them. None: the width of what is made.
    """
    prefix_projection: bool = False
    """Prefix tuning: train an MLP that makes the keys and values, instead of these themselves."""
    objective: Objective = "sft"
    """What is minimised: SFT on answers, DPO, IPO or ORPO on pairs of them, KTO on rated ones."""
    beta: float = Field(0.1, gt=0)
    """DPO, IPO, KTO: how strongly the adapter is held to the base; ORPO: the weight of the odds ratio."""
    desirable_weight: float = Field(1.0, gt=0)
    """KTO: the weight of answers to give. Where there are fewer of them, more than 1 makes up for it (TRL advises that
    weight × number of the one kind be 1 to 4/3 of the other's)."""
    undesirable_weight: float = Field(1.0, gt=0)
    """KTO: the weight of answers not to give."""

    # -- the step
    learning_rate: float | None = Field(None, gt=0, lt=1)
    """At its peak. None: by the size of the base and the method (training/defaults.py has the sources)."""
    epochs: float = Field(2.0, gt=0)
    """How often each row is seen. The last step is filled up with rows of the next round: 30 rows twice, 8 a step, are
    8 steps and end at epoch 2.13."""
    max_steps: int | None = Field(None, ge=1)
    """At most so many optimizer steps."""
    batch_rows: int = Field(8, ge=1)
    """Rows for each optimizer step; the loss is the mean over all their tokens to learn."""
    micro_batch_tokens: int | None = Field(None, ge=16)
    """Rows are packed into pieces of about this many tokens; memory grows with it, little else does. None: planned."""
    optimizer: Optimizer = "adamw"
    """AdamW; paged 8-bit AdamW (CUDA); Adafactor, which keeps less; Lion."""
    weight_decay: float = Field(0.0, ge=0)
    """How strongly the adapter's matrices are pulled towards zero."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """How much of the mean gradient each step keeps."""
    beta2: float | None = Field(None, ge=0, lt=1)
    """None: each optimizer's own, 0.999 for AdamW and 0.99 for Lion."""
    loraplus_ratio: float = Field(16.0, ge=1)
    """LoRA+: how much higher the learning rate of B is than that of A."""
    update_proj_gap: int = Field(200, ge=1)
    """GaLore: steps after which the directions are found anew in which gradients are seen."""
    schedule: Schedule = "linear"
    """How the learning rate falls behind the warm-up."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises; at most half of the run."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """WSD: the share of the steps over which the learning rate falls at the end."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to this."""
    neftune_alpha: float = Field(0.0, ge=0)
    """NEFTune: noise on the embeddings while training (5 is usual); 0 for none."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The share of each target that is spread over the whole vocabulary."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """The adapter that is kept is the moving average of the trained one, where this is above 0."""

    # -- the machine
    device: str = "auto"
    """Where training runs: auto, cpu, cuda or mps."""
    dtype: Literal["auto", "f32", "bf16"] = "auto"
    """The number format of matrix products. Residual stream, norms and adapters are float32 always."""
    base_dtype: BaseDtype = "auto"
    """How the frozen weights are held: `blocks` as the file stores them, dequantized on use; or turned on opening into
    floats, NF4 or a type of llama.cpp's."""
    recompute: Literal["auto", "off", "full"] = "auto"
    """Whether a layer's activations are computed again in the backward pass instead of kept."""
    offload: bool = False
    """CUDA: keep activations in the machine's memory until the backward pass needs them."""
    shard_base: bool = False
    """Under torchrun: each process holds a share of the base and gathers it layer by layer, for one that no card holds.
    """
    cuda_graphs: bool = True
    """CUDA: record passes through the layers and repeat them, which spares Python launching every kernel."""
    max_gpu_memory: str | None = Field(None, pattern=r"^\d+(\.\d+)?\s*(GB|GiB|MB|MiB)$")
    """CUDA: hold the process to this much of the card's memory, such as `8GB`."""

    # -- during the run
    eval_every: int | None = Field(None, ge=1)
    """Steps between two measurements of the held-out loss. None: ten in a run."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many measurements without a better held-out loss."""
    keep_adapter: Literal["last", "best"] = "last"
    """Which adapter is written at the end: of the last step, or of the one whose held-out loss was the lowest. With
    `patience` it is that one always. A run that ended can be asked again, with `resume`."""
    samples: tuple[str, ...] = ()
    """Prompts that are answered at each measurement, to be read: greedily, always the likeliest token."""
    save_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints. None: every 100, and at each measurement."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints are kept beside the best."""
    tensorboard: bool = False
    """Write TensorBoard's event files too (extra `tensorboard`)."""
    seed: int = Field(0, ge=0)
    """Same seed, data and machine: same adapter, bit for bit (CPU). What is left open is chosen by the memory that is
    free: where that is short, say micro_batch_tokens, max_length and base_dtype too."""
    resume: bool = False
    """Go on with the run that was begun at --out, exactly where it was."""
    overwrite: bool = False
    """Replace what stands at --out."""
