"""What `exit_plan` has to know, read off an adapter and a base; of the base no weight is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf.constants import GGMLQuantizationType

from converters.base_to_gguf import plan
from converters.token_pairs import EMBEDDING
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.peft.adapter import Adapter
from edgelora.peft.change import Change
from edgelora.peft.of_weight import InPlaceOf
from edgelora.peft.soft_prompt import TrainedPrompt

Type = GGMLQuantizationType

DOWN = "mlp.down_proj"


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter does, by GGUF's names of the tensors."""

    one: str
    """`a DoRA`."""
    pairs: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """(d_out, d_in, r) of every B A."""
    scaled: frozenset[str] = frozenset()
    """The weights whose rows are multiplied: a DoRA's, an IA3's; for columns of down_proj the rows before them."""
    whole: frozenset[str] = frozenset()
    """The weights that change in another way."""
    replaced: frozenset[str] = frozenset()
    """The weights in whose place others stand, trained whole: the embedding, the head, named layers."""
    biases: frozenset[str] = frozenset()
    """The layers, by their names in a block (`self_attn.q_proj`), whose bias changes or is new."""
    norms: int = 0
    """How many norms have new weights."""
    token_rows: Mapping[str, int] = field(default_factory=dict)
    """How many rows of the embedding or the head are trained."""
    becomes: Mapping[str, Type] | None = None
    """As what a patched base stores each weight that changes, where that was measured; None: it goes by their types."""
    moved: float = 0.0
    """How far weights move by that at most, of a tensor the root mean square relative to its own, where measured."""
    prompt_numbers: int = 0
    """How many numbers stand before every prompt."""
    prefix: bool = False
    """Whether these are keys and values."""
    waits: bool = False
    """Whether it acts from an invocation on (aLoRA)."""
    of_input: str = ""
    """Why no weight can hold it; empty where one can."""

    @property
    def on_embedding(self) -> bool:
        """Whether a LoRA makes rows of the embedding others, which llama.cpp has beside a head of its own alone."""
        return bool(self.token_rows) or EMBEDDING in self.pairs


@dataclass(frozen=True)
class BaseFacts:
    """What a base is. `types`: of its tensors, by their GGUF names; none of a checkpoint's."""

    quant: str
    size_bytes: int
    tied: bool
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, Type] = field(default_factory=dict)
    own_biases: frozenset[str] = frozenset()
    loaded_biases: frozenset[str] = frozenset()
    """The layers whose bias llama.cpp loads in this family."""
    windowed: bool = False
    """Whether some of its layers see a window of tokens only."""

    @property
    def is_gguf(self) -> bool:
        return bool(self.types)

    @property
    def floats(self) -> bool:
        """Whether no matrix is quantized."""
        return all(kind in ggml.FLOATS for kind in self.types.values())


def facts_of_adapter(adapter: Adapter, base: Base) -> AdapterFacts:
    """Of an adapter that fits `base`. Its tensors are read one layer at a time."""
    if adapter.kind.of_input:
        return AdapterFacts(adapter.kind.one, of_input=adapter.kind.of_input)
    pairs: dict[str, tuple[int, int, int]] = {}
    scaled, whole, replaced, biases = set[str](), set[str](), set[str](), set[str]()
    for module in (*adapter.linears, *(one for one in adapter.vocabularies if one in base.vocabularies)):
        change, tensor = adapter.change(module), base.tensor_of(module)
        if isinstance(change.whole, InPlaceOf):
            replaced.add(tensor)
        if change.pair is not None:
            pairs[tensor] = (*{**base.linears, **base.vocabularies}[module], change.pair.rank)
        if change.rows is not None or (change.pair is not None and change.pair.magnitude is not None):
            scaled.add(tensor)
        if change.columns is not None and module.endswith(DOWN):
            scaled.add(base.tensor_of(base.architecture.before_down(module)))
        elif change.whole is not None or change.columns is not None:
            whole.add(tensor)
        if module in base.linears and _changes_bias(change, module, base):
            biases.add(module.split(".", 3)[3])
    return AdapterFacts(
        adapter.kind.one, {name: pair for name, pair in pairs.items() if name not in whole}, frozenset(scaled - whole),
        frozenset(whole - replaced), frozenset(replaced), frozenset(biases), len(adapter.norms),
        {base.tensor_of(module): len(ids) for module, (ids, _) in adapter.token_rows.items()},
        waits=bool(adapter.invocation),
    )  # fmt: skip


def facts_of_prompt(prompt: TrainedPrompt) -> AdapterFacts:
    """Of what stands before every prompt."""
    parts = (prompt.embeddings, prompt.keys, prompt.values)
    numbers, prefix = sum(part.size for part in parts if part is not None), prompt.keys is not None
    return AdapterFacts("a prefix" if prefix else "a soft prompt", prompt_numbers=numbers, prefix=prefix)


def facts_of_base(base: Base) -> BaseFacts:
    """Of a GGUF or a checkpoint, which then is as the GGUF of F16 that `edgelora convert` writes."""
    if base.is_gguf:
        tensors = base.file.tensors
        shapes, types = {n: t.shape for n, t in tensors.items()}, {n: t.type for n, t in tensors.items()}
        size = sum(path.stat().st_size for path in base.source.files)
    else:
        targets = plan(base, Type.F16)
        shapes, types = {name: target.shape for name, target in targets.items()}, {}
        size = sum(target.size_bytes for target in targets.values())
    return BaseFacts(
        base.quant, size, base.config.tie_word_embeddings, shapes, types, frozenset(base.biased),
        frozenset(base.architecture.llama_cpp.biases), _windowed(base),
    )  # fmt: skip


def _windowed(base: Base) -> bool:
    """Whether llama.cpp keeps the keys and values of some layers for a window of tokens only."""
    windows = map(base.config.window, range(base.config.num_hidden_layers))
    return base.architecture.llama_cpp.applies_window and any(windows)


def _changes_bias(change: Change, module: str, base: Base) -> bool:
    """Whether a bias of the file has another value with it."""
    own = module.split(".", 3)[3] in base.biased
    return change.bias is not None or (own and change.rows is not None)
