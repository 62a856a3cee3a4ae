"""An adapter that is more than B A → a *patched base*, and a LoRA over it for what is B A: nothing is quantized again.

DoRA's W' = diag(g) (W + B A), g = m / ‖W + B A‖, IA3's factors, BitFit's biases and the weights of norms are in reach
of a GGUF's own numbers: a factor of a row goes into the scales of its blocks (`scaled_rows.py`), a bias or a norm is a
float. What was trained whole (PEFT's modules_to_save) stands in the place of the base's own. What is left of a DoRA,
diag(g) B A, is an exact LoRA over that file. A factor of a column of down_proj is one of a row of up_proj, through
SwiGLU: down(act(gate) ∘ up ∘ l). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.adapted import Adapted, Deltas, of_gguf
from converters.adapter_to_gguf import write_pairs
from converters.base_to_gguf import Slab, slabs
from converters.exit_plan import ROUNDING, type_of_trained
from converters.merge import Part, Recipe, describe, new_biases, quantized, targets_of
from converters.scaled_rows import can_scale, scale_rows
from converters.stream import Entry, write_streamed
from converters.token_pairs import EMBEDDING, looked_up, require_two_matrices, token_pairs
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.files.contract import Contract
from edgelora.files.lazy import Lazy
from edgelora.peft.adapter import Adapter
from edgelora.peft.change import Change, LoraPair
from edgelora.peft.of_weight import InPlaceOf
from edgelora.progress import OnProgress, silent
from edgelora.words import count

Type = GGMLQuantizationType
How = Literal["scaled", "widened", "replaced", "merged"]

# Beyond it a tensor's scaled blocks lose what matters beside the adapter: it then becomes F16. Q8_0 would be smaller,
# but quantizing to it again costs 5e-3, more than the subnormal scales that it would be taken for.
LARGEST_ERROR = 1e-3


@dataclass(frozen=True)
class Patch:
    """What becomes of a weight: its rows are `scaled` as they are stored, or `widened` to F16 and scaled; one that was
    trained whole has it `replaced`, as its own type or F16; and where else a matrix changes, it is `merged` and
    quantized again."""

    how: How
    kind: Type
    error: float | None
    """What rounding does to it: root mean square, relative to its own, or of F16 the most. None where it is quantized
    again."""
    factors: np.ndarray | None = None
    """Of its rows, float32 (d_out,)."""


@dataclass(frozen=True)
class PatchPlan:
    """What a patched base is made of: every weight that changes, by its GGUF name; and what stays a LoRA over it."""

    adapted: Adapted
    patches: Mapping[str, Patch]
    rest: Mapping[str, LoraPair]

    @property
    def error(self) -> float:
        """The largest rounding error of a tensor: root mean square, relative to its own."""
        return max((patch.error for patch in self.patches.values() if patch.error is not None), default=0.0)

    @property
    def notes(self) -> list[str]:
        """What did not go by its own scales, in words."""
        widened = sorted(name for name, patch in self.patches.items() if patch.how == "widened")
        merged = sorted(name for name, patch in self.patches.items() if patch.how == "merged")
        replaced = [(patch.error or 0.0, name) for name, patch in self.patches.items() if patch.how == "replaced"]
        found = []
        if widened:
            found.append(
                f"{_counted(widened)} became F16: scales of blocks there cannot take up a factor, or lose more than "
                f"{LARGEST_ERROR:g} by it"
            )
        if merged:
            found.append(f"changed as a whole, merged and quantized again: {_counted(merged)}")
        if replaced:
            error, name = max(replaced)
            kind = self.patches[name].kind.name
            lost = f"; storing {name} as {kind} lost {error:.2g} of its size, and no other more"
            whole = ", and nothing of them was lost"
            found.append(
                f"trained whole, and now in the base: {len(replaced)} of its tensors{lost if error else whole}"
            )
        return found


def _counted(names: Sequence[str]) -> str:
    """`2 tensors (blk.0.attn_k.weight …)`."""
    return f"{count(len(names), 'tensor')} ({names[0]}{' …' * (len(names) > 1)})"


def plan_patch(base: Base, adapter: Adapter) -> PatchPlan:
    """What a patch of `base`, a GGUF, would be: reads every weight that the adapter scales once, and writes nothing."""
    adapted = of_gguf(adapter, base)
    adapted = _folded(adapted, base)
    found = ((name, _patch(base, name, adapted.weights[name])) for name in adapted.weights)
    patches = {name: patch for name, patch in found if patch is not None}
    pairs = [
        name for name in adapted.weights
        if (name not in patches or patches[name].how not in ("merged", "replaced"))
        and adapted.weights[name].pair is not None
    ]  # fmt: skip
    rows = token_pairs(base, adapter.token_rows)
    if EMBEDDING in pairs:
        require_two_matrices(base)

    def rest_of(name: str) -> LoraPair:
        if name in rows:
            return rows[name]
        pair, patch = adapted.weights[name].pair, patches.get(name)
        assert pair is not None
        factors = None if patch is None else patch.factors
        left = LoraPair(pair.a, pair.b if factors is None else pair.b * factors[:, None])
        return looked_up(left) if name == EMBEDDING else left

    return PatchPlan(adapted, patches, Lazy({name: name for name in (*pairs, *rows)}, rest_of))


def write_patched(out: Path, base: Base, plan: PatchPlan, part: Part, on_progress: OnProgress = silent) -> None:
    """Write the patched base to `out` (a staged path). Raises ExportError for a bias that llama.cpp does not load."""
    added, deltas = new_biases(base, [part]), Deltas([(plan.adapted, 1.0)])
    own = {name: Entry(target.shape, target.kind) for name, target in targets_of(base).items()}
    kinds = {name: patch.kind for name, patch in plan.patches.items()}
    entries: dict[str, Entry] = {name: replace(entry, kind=kinds.get(name, entry.kind)) for name, entry in own.items()}
    entries |= {name: Entry(target.shape, target.kind) for name, target in added.items()}
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    describe(writer, Recipe(base, [part], {}, base.file.get("general.file_type", int), patched=True))

    def rows_of(name: str) -> Iterator[np.ndarray]:
        patch = plan.patches.get(name)
        if patch is not None and patch.factors is not None:
            yield from _scaled(base, name, patch)
        elif name in added:
            zeros = Slab(0, 0, np.zeros((1, *added[name].shape), np.float32))
            yield quantized(deltas.merged(name, zeros), Type.F32, name)
        elif patch is not None or (name in deltas.touched and len(own[name].shape) == 1):
            for slab in slabs(base, name, targets_of(base)[name]):
                yield quantized(deltas.merged(name, slab), entries[name].kind, name)
        else:
            yield base.file.rows(name)
            base.file.forget(name)

    write_streamed(writer, entries, rows_of, "patch", on_progress)


def write_rest(
    out: Path, base: Base, plan: PatchPlan, name: str, contract: Contract | None, dtype: str = "F16"
) -> None:
    """Write what is left of the adapter as a LoRA over the patched base, whose contract `contract` is.

    Raises ExportError if a value does not fit into `dtype`.
    """
    write_pairs(out, plan.rest, base.architecture.gguf_name, name, dtype, contract)


def _folded(adapted: Adapted, base: Base) -> Adapted:
    """The same where no column of a down_proj is multiplied: the rows before it are."""
    weights = adapted.weights
    down = {m: base.architecture.before_down(m)
            for m in base.linears if m.endswith("mlp.down_proj") and base.tensor_of(m) in weights}  # fmt: skip
    before = {base.tensor_of(up): base.tensor_of(m) for m, up in down.items()}
    after = set(before.values())

    def change_of(name: str) -> Change:
        change = weights.get(name, Change())
        if name in after:
            return replace(change, columns=None)
        columns = weights[before[name]].columns if name in before else None
        return change if columns is None else _times(change, columns, base.architecture.fused)

    names = {name: name for name in (*weights, *(name for name in before if name not in weights))}
    biases = {f"{name.removesuffix('.weight')}.bias": name for name in names}
    return replace(adapted, weights=Lazy(names, change_of), biases=Lazy(biases, change_of))


def _times(change: Change, factors: np.ndarray, fused: bool) -> Change:
    """What the change makes of a layer, its answer times these; of a fused layer the second half is meant."""
    if fused:
        factors = np.concatenate([np.ones_like(factors), factors])
    rows = factors if change.rows is None else change.rows * factors
    bias = change.bias
    if bias is not None:
        bias = InPlaceOf(bias.values * factors) if isinstance(bias, InPlaceOf) else bias * factors
    return replace(change, rows=rows, bias=bias)


def _patch(base: Base, name: str, change: Change) -> Patch | None:
    """What becomes of one weight; None: it stays as it is, whatever LoRA lies beside it."""
    kind = base.file.tensors[name].type
    if isinstance(change.whole, InPlaceOf):
        becomes = type_of_trained(kind)
        return Patch("replaced", becomes, _error_of(base, name, change.whole, becomes))
    if change.whole is not None or change.columns is not None:
        return Patch("merged", kind, None)
    if change.rows is None and (change.pair is None or change.pair.magnitude is None):
        return None
    factors, wrong, size = [], 0.0, 0.0
    for slab in slabs(base, name, targets_of(base)[name]):
        rows = slice(slab.first, slab.first + len(slab.floats))
        factors.append(_factors(change.of(rows), slab.floats))
        wanted = slab.floats * factors[-1][:, None]
        size += float(np.square(wanted, dtype=np.float64).sum())
        if can_scale(kind):
            scaled = scale_rows(base.file.rows(name)[rows], kind, factors[-1])
            found = ggml.dequantize(scaled, kind, wanted.shape[1])
            with np.errstate(invalid="ignore"):
                wrong += float(np.square(found - wanted, dtype=np.float64).sum())
    error = float(np.sqrt(wrong / size)) if size else 0.0
    whole = np.concatenate(factors)
    if can_scale(kind) and (error <= LARGEST_ERROR or kind in ggml.FLOATS):
        return Patch("scaled", kind, error, whole)
    return Patch("widened", Type.F16, ROUNDING[Type.F16], whole)


def _error_of(base: Base, name: str, trained: InPlaceOf, kind: Type) -> float:
    """What storing this weight as `kind` does to it: root mean square, relative to its own."""
    wrong = size = 0.0
    for slab in slabs(base, name, targets_of(base)[name]):
        wanted = trained.values[slab.first : slab.first + len(slab.floats)]
        found = ggml.dequantize(quantized(wanted, kind, name), kind, wanted.shape[1])
        wrong += float(np.square(found - wanted, dtype=np.float64).sum())
        size += float(np.square(wanted, dtype=np.float64).sum())
    return float(np.sqrt(wrong / size)) if size else 0.0


def _factors(change: Change, weight: np.ndarray) -> np.ndarray:
    """By what each of these rows of W + B A is multiplied, float32 (n,)."""
    own = np.ones(len(weight), np.float32) if change.pair is None else change.pair.factors(weight)
    return own if change.rows is None else own * change.rows


def _scaled(base: Base, name: str, patch: Patch) -> Iterator[np.ndarray]:
    """The rows of a tensor times its factors, as they are stored or as F16."""
    factors, kind = patch.factors, base.file.tensors[name].type
    assert factors is not None
    for slab in slabs(base, name, targets_of(base)[name]):
        rows = slice(slab.first, slab.first + len(slab.floats))
        if patch.how == "scaled" and kind not in ggml.FLOATS:
            yield scale_rows(base.file.rows(name)[rows], kind, factors[rows])
        else:
            yield quantized(slab.floats * factors[rows, None], patch.kind, name)
