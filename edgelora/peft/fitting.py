"""Whether what an adapter's file holds for each module fits the base: every fault in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from edgelora.architectures.layers import Layers
from edgelora.architectures.names import EMBEDDING, HEAD, is_norm
from edgelora.peft.kind import BIAS, EMBEDDING_A, EMBEDDING_B, NORM, ROWS, WHOLE, Kind, Parts, Settings, row_ids
from edgelora.peft.strangers import ONE_MATRIX, no_linear
from edgelora.peft.targets import by_pattern

NO_ROWS = "its tokens have no rows that are read here"


def layers_told(kind: Kind | None, tensors: Mapping[str, tuple[int, ...]]) -> Layers:
    """What a file's tensors, of these shapes, were made for: (d_out, d_in), (V, d), 0 where none tells it, and the
    others."""
    linears: dict[str, tuple[int, int]] = {}
    norms: dict[str, int] = {}
    matrices: dict[str, tuple[int, int]] = {}
    biased: set[str] = set()
    for name, shape in tensors.items():
        place = None if kind is None else kind.place(name)
        if kind is None or place is None:
            continue
        module, part = place
        if part == ROWS:
            matrices[module] = (0, shape[-1] if shape else 0)
        elif part == NORM and (is_norm(f"{module}.{NORM}") or not kind.saves):
            norms[module] = shape[0] if shape else 0
        else:
            layers = matrices if module in (EMBEDDING, HEAD) and kind.vocabularies else linears
            d_out, d_in = layers.get(module, (0, 0))
            found = kind.sizes(part, shape)
            layers[module] = (found.get("out", d_out), found.get("in", d_in))
            if part == BIAS and layers is linears:
                biased.add(module.split(".", 3)[-1])
    return Layers(linears, norms, matrices, biased)


def module_faults(kind: Kind, module: str, parts: Parts, layers: Layers) -> list[str]:
    """What is wrong with the parts of one module, its name in front."""
    if module in layers.norms or (NORM in parts and (not kind.saves or is_norm(f"{module}.{NORM}"))):
        found = list(_norm_faults(parts, layers.norms.get(module)))
    elif ROWS in parts:
        found = [] if module in layers.matrices else [NO_ROWS]
    elif module in layers.matrices and kind.vocabularies:
        found = list(_vocabulary_faults(kind, module, parts, layers.matrices[module]))
    elif module in layers.linears:
        found = list(_linear_faults(kind, parts, *layers.linears[module]))
        if kind.saves:
            found += _bias_faults(parts, module.split(".", 3)[3] in layers.biased)
    else:
        return [no_linear(module)]
    if not found and not all(np.isfinite(part).all() for part in parts.values()):
        found = ["it holds NaN or infinite values"]
    return [f"{module}: {fault}" for fault in found]


def rank_faults(settings: Settings, module: str, parts: Parts) -> Iterator[str]:
    """Whether A of a LoRA has another rank than its settings say: PEFT divides α by that one, and loads no other.

    settings: those of a sound adapter_config.json.
    """
    a = parts.get(EMBEDDING_A, parts.get("lora_A"))
    if settings.get("peft_type") == "LORA" and a is not None and "r" in settings:
        rank, stated = len(a), by_pattern(settings.get("rank_pattern") or {}, module, settings["r"])
        if rank != stated:
            yield f"{module}: its rank is {rank}, and its settings say {stated}"


def rows_faults(settings: Settings, tensors: Mapping[str, Parts], layers: Layers) -> Iterator[str]:
    """What is wrong with the rows that some tokens have. settings: those of a sound adapter_config.json."""
    beside = "token_indices" not in settings  # a LoRA, which says of which of the two it has rows
    for module in (EMBEDDING, HEAD):
        ids, parts = row_ids(settings, module), tensors.get(module, {})
        if ids is None or ROWS not in parts:
            if ROWS in parts:
                yield f"{module}: it has rows, and of which tokens is not said"
            elif ids is not None and (parts or (beside and layers.vocabularies.get(module, (0, 0))[0])):
                yield f"{module}: {ROWS} is missing"
            continue
        n, d = layers.matrices[module]
        if parts[ROWS].shape != (len(ids), d):
            yield f"{module}: {ROWS} is {parts[ROWS].shape}, expected ({len(ids)}, {d})"
        if n and max(ids) >= n:
            yield f"{module}: it has the id {max(ids)}, and the base has {n} tokens"


def head_of(embedding: Parts) -> Parts:
    """The parts of a head that is adapted as the embedding is."""
    pair = {"lora_A": EMBEDDING_B, "lora_B": EMBEDDING_A}
    return {part: embedding[other].T for part, other in pair.items()} if EMBEDDING_A in embedding else embedding


def tied_faults(kind: Kind, tensors: Mapping[str, Parts], settings: Settings) -> Iterator[str]:
    """What is wrong with the embedding and the head, one of which is there, over a base with one matrix for both."""
    embedding, head = tensors.get(EMBEDDING, {}), tensors.get(HEAD, {})
    wanted = head_of(embedding)
    alike = bool(embedding) and wanted.keys() == head.keys() and _said_alike(settings)
    if alike and all(np.array_equal(values, wanted[part]) for part, values in head.items()):
        return
    rows = ROWS in embedding or ROWS in head
    if (kind.saves or kind.of_embedding) and not rows:
        apart = "the head is not the embedding" if embedding and head else "one of embedding and head stays as it was"
        yield f"{apart}, and {ONE_MATRIX}"
    elif head:
        yield f"{HEAD}: its rows are not the embedding's, and {ONE_MATRIX}"


def _said_alike(settings: Settings) -> bool:
    """Whether α and tokens are the same of embedding and head."""
    patterns = settings.get("alpha_pattern") or {}
    return all(
        say(EMBEDDING) == say(HEAD)
        for say in (lambda module: by_pattern(patterns, module, None), lambda module: row_ids(settings, module))
    )


def _norm_faults(parts: Parts, width: int | None) -> Iterator[str]:
    if width is None:
        yield "it is no norm of this model"
    elif set(parts) != {NORM}:
        yield f"{' and '.join(sorted(set(parts) - {NORM}))}: a norm has a weight alone"
    elif parts[NORM].shape != (width,):
        yield f"its weight is {parts[NORM].shape}, expected ({width},)"


def _vocabulary_faults(kind: Kind, module: str, parts: Parts, shape: tuple[int, int]) -> Iterator[str]:
    adapted = set(kind.of_embedding if module == EMBEDDING and kind.of_embedding else kind.parts)
    wanted = ([{WHOLE}] if kind.saves else []) + ([adapted] if kind.of_embedding or not kind.saves else [])
    if set(parts) not in wanted:
        expected = " or ".join(" and ".join(sorted(one)) for one in wanted)
        yield f"it has {' and '.join(sorted(parts))}, expected {expected}"
    else:
        yield from kind.shape_faults(parts, *shape)


def _linear_faults(kind: Kind, parts: Parts, d_out: int, d_in: int) -> Iterator[str]:
    alone = kind.saves and not any(part in parts for part in kind.parts)  # saved whole, or its bias is
    missing = [] if alone else [part for part in kind.parts if part not in parts]
    if strange := sorted(set(kind.of_embedding) & set(parts)):
        yield f"{' and '.join(strange)}: it is no embedding"
    elif missing:
        yield f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    elif kind.saves and WHOLE in parts and not alone:
        yield "it is saved whole, and has A and B too"
    else:
        yield from kind.shape_faults(parts, d_out, d_in)


def _bias_faults(parts: Parts, biased: bool) -> Iterator[str]:
    if BIAS in parts and not biased:
        yield "it has a bias, and none is trained here in the base's"
    elif WHOLE in parts and BIAS not in parts and biased:
        yield "it is saved whole, and its bias is missing"
