"""Whether options, a plan, its source and an importance matrix fit together: asked before anything is written.

llama.cpp aborts the process on some of these faults, and finds others after minutes of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.quant_types import (
    COPY,
    EMBEDDINGS,
    HEAD,
    QUANT_TYPES,
    WITHOUT_RECIPE,
    parse_tensor_type,
    parse_type,
    requires_importance,
)
from edgelora.errors import ConfigError, ExportError, some
from edgelora.files.gguf import TensorInfo

if TYPE_CHECKING:
    from converters.plan import Plan, QuantizeOptions  # they are checked as they are made

Type = GGMLQuantizationType


def check_options(options: QuantizeOptions, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ConfigError for options that cannot be, or that llama.cpp would ignore or abort on for these `tensors`."""
    parse_type(options.kind)
    kind = options.kind.upper()
    for _, name in options.tensor_types:
        parse_tensor_type(name)
    if options.threads < 1:
        raise ConfigError(f"{options.threads} threads", "somebody has to do the work", "ask for 1 or more")
    if kind in WITHOUT_RECIPE and (options.tensor_types or options.pure):
        raise _ignored("--tensor-type and --pure", kind, "it changes no recipe: every matrix becomes the same")
    if kind == COPY and (options.output_type or options.embedding_type or options.imatrix is not None):
        raise _ignored("types and importance", kind, "it copies every tensor as it is")
    asked = [(name, options.embedding_type) for name in EMBEDDINGS] + [(HEAD, options.output_type)]
    for name, type_name in asked:
        if type_name is not None:
            _check_columns(name, parse_tensor_type(type_name), tensors)


def _ignored(what: str, kind: str, why: str) -> ConfigError:
    return ConfigError(f"{what} with {kind}", why, "leave them out, or choose a type such as Q4_K_M")


def _check_columns(name: str, kind: Type, tensors: Mapping[str, TensorInfo]) -> None:
    """llama.cpp takes these two types as they are, without falling back, and aborts."""
    block = GGML_QUANT_SIZES[kind][0]
    if name in tensors and (columns := tensors[name].shape[-1]) % block:
        raise ConfigError(
            what=f"{name} cannot be {kind.name}: its rows of {columns} do not divide into blocks of {block}",
            why="rows are never padded, and llama.cpp ends the process here instead of choosing another type",
            fix="choose a type with smaller blocks, such as Q8_0, Q5_0 or IQ4_NL",
        )


def check_plan(plan: Plan, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ConfigError, with every fault, if `plan` is not one for a model of these `tensors`."""
    planned = {t.name: t for t in plan.tensors}
    faults = [f"{name} is not in the model" for name in planned if name not in tensors]
    faults += [f"{name} is not in the plan" for name in tensors if name not in planned]
    for name, info in tensors.items():
        t = planned.get(name)
        if t is not None and t.shape != info.shape:
            faults.append(f"{name} is {info.shape} in the model and {t.shape} in the plan")
        elif t is not None and t.type != info.type and not _may_change(t.name, info.shape):
            faults.append(f"{name} must stay {info.type.name}: llama.cpp reads norms, biases and routers as they are")
    if faults:
        raise ConfigError(
            what=f"the plan does not fit this model: {some(faults, 5)}",
            why="it was made for another model, or edited in more than its types",
            fix="make one for this model with `--save-plan`",
        )


def _may_change(name: str, shape: Sequence[int]) -> bool:
    return (
        len(shape) > 1
        and name.endswith(".weight")
        and not name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    )  # fmt: skip


def check_importance(plan: Plan, imatrix: Mapping[str, np.ndarray] | None) -> None:
    """Raise ExportError if a tensor of `plan` needs importance that is not there, or if there is some that is wrong.

    imatrix: by tensor name, float32 (n_matrices * columns,). Names that the plan lacks are of no account.
    """
    found = imatrix or {}
    changed = [t for t in plan.tensors if t.type != t.source]
    file_type = QUANT_TYPES[plan.kind]
    missing = [t for t in changed if t.name not in found and requires_importance(t.name, t.type, file_type)]
    if missing:
        raise ExportError(
            what=f"{plan.kind}: {len(missing)} tensors need an importance matrix ({missing[0].name} as "
            f"{missing[0].type.name})" + (", and this one says nothing of them" if imatrix is not None else ""),
            why="at so few bits the result is garbage unless the columns that matter are known",
            fix="make one with `edgelora imatrix MODEL --data ROWS --out FILE` and pass --imatrix FILE",
        )
    for t in changed:
        values = found.get(t.name)
        if values is None:
            continue
        if values.size != (size := importance_size(t.shape)) and t.name not in EMBEDDINGS:
            raise _wrong(f"{t.name} has {values.size} importances, expected {size}")
        if not np.isfinite(values).all():
            raise _wrong(f"{t.name} has an importance that is no number")


def importance_size(shape: Sequence[int]) -> int:
    """How many importances a tensor has: a row of columns for each of its matrices."""
    return shape[-1] * (shape[0] if len(shape) > 2 else 1)


def _wrong(fault: str) -> ExportError:
    return ExportError(
        what=f"the importance matrix does not fit: {fault}",
        why="it was made of another model, or the file is damaged",
        fix="make one of this very model: `edgelora imatrix MODEL --data ROWS --out FILE`",
    )
