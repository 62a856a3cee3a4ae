"""Several adapters over one base → one LoRA, module by module. Imports no torch.

Each way is PEFT's `add_weighted_adapter` of the name that its row gives, and comes to the same ΔW. Of a whole model
only the factors of the result are in memory; a ΔW is formed by the ways that need its entries, one layer at a time:
at most one matrix for each adapter and WORKING_MATRICES more of the size of that layer, in float32.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from converters.task_tensors import Composed, Thinning, leading, stacked, thin, together, truncated
from edgelora.errors import AdapterError, ConfigError, some
from edgelora.peft.adapter import IN_TORCH, Adapter, LoraPair

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in) of linear layers
WORKING_MATRICES = 5  # the result, the elected signs, how many agree, and two between one step and the next


@dataclass(frozen=True)
class How:
    """A way to compose the task tensors of a layer: thin each of them, then add them up at their weights."""

    peft: str
    """PEFT's `combination_type`."""
    factors: bool = False
    """Whether the tensors are A and B, each by itself, rather than ΔW: cheap, but B₁A₂ and B₂A₁ come in as well."""
    thins: Thinning | None = None
    elects: bool = False
    """Whether each entry takes only the values of the sign that the sum of all has, and is their mean."""


HOWS: dict[str, How] = {
    # task arithmetic (arXiv:2212.04089): of all adapters exactly, or of A and of B
    "sum": How("cat"),
    "linear": How("linear", factors=True),
    # arXiv:2306.01708: keep the largest entries, elect a sign for each, and take the mean of what agrees
    "ties": How("ties_svd", thins="largest", elects=True),
    "ties_factors": How("ties", factors=True, thins="largest", elects=True),
    # arXiv:2311.03099: drop entries at random and rescale the others, then add up, or go on as TIES does
    "dare": How("dare_linear_svd", thins="random"),
    "dare_factors": How("dare_linear", factors=True, thins="random"),
    "dare_ties": How("dare_ties_svd", thins="random", elects=True),
    "dare_ties_factors": How("dare_ties", factors=True, thins="random", elects=True),
    # keep the largest entries, and add up
    "magnitude": How("magnitude_prune_svd", thins="largest"),
    "magnitude_factors": How("magnitude_prune", factors=True, thins="largest"),
}


@dataclass(frozen=True)
class Part:
    """An adapter to compose and its weight: negative to take away what it learned. `name` is for messages."""

    adapter: Adapter
    weight: float
    name: str


@dataclass(frozen=True)
class Recipe:
    """How to compose."""

    how: str = "sum"
    """A name of HOWS."""
    density: float = 0.5
    """The share of entries that is kept, where any are dropped."""
    rank: int | None = None
    """Of the result, by its singular values. None: a sum keeps Σ r, and a thinned ΔW gets the largest rank put in."""
    seed: int = 0
    """Of the entries that are dropped at random."""

    @property
    def way(self) -> How:
        return HOWS[self.how]


def compose(parts: Sequence[Part], recipe: Recipe, linears: Shapes) -> Iterator[tuple[str, Composed]]:
    """The LoRA of every layer that any of the adapters changes, in the base's order; nothing of the last one is kept.

    linears: (d_out, d_in) of the base's layers. Raises ConfigError or AdapterError before the first, with all faults.
    """
    _require_sense(recipe)
    rank = _require_composable(parts, recipe, linears)
    for module in linears:
        if any(module in part.adapter.tensors for part in parts):
            yield module, _composed(parts, recipe, module, rank)


def n_layers(parts: Sequence[Part]) -> int:
    """How many layers `compose` will give."""
    return len(set().union(*(part.adapter.tensors for part in parts)))


@dataclass(frozen=True)
class _Term:
    """What one adapter brings to a layer. scale: α/r, which `pair` has in its B; draw: what drops its entries."""

    pair: LoraPair
    weight: float
    scale: float
    draw: np.random.Generator


def _composed(parts: Sequence[Part], recipe: Recipe, module: str, rank: int) -> Composed:
    terms = [
        _Term(pair, part.weight, _scale(part.adapter, module, pair), _draw(recipe.seed, number, module))
        for number, part in enumerate(parts)
        if module in part.adapter.tensors and (pair := part.adapter.pair(module))
    ]
    if recipe.how == "sum":
        return truncated(stacked([t.pair for t in terms], [t.weight for t in terms]), recipe.rank)
    if recipe.way.factors:
        return truncated(_of_factors(terms, recipe), recipe.rank)
    return leading(_of_changes(terms, recipe), rank)


def _of_changes(terms: Sequence[_Term], recipe: Recipe) -> np.ndarray:
    """The composed ΔW (d_out, d_in)."""
    thinned = [_thin(t.pair.b @ t.pair.a, recipe, t) for t in terms]
    return together(thinned, [t.weight for t in terms], elects=recipe.way.elects)


def _of_factors(terms: Sequence[_Term], recipe: Recipe) -> LoraPair:
    """A and B, each composed by itself; as in PEFT √|w α/r| goes to both and the sign to A."""
    elects, roots = recipe.way.elects, [abs(t.weight * t.scale) ** 0.5 for t in terms]
    signed = [root if t.weight * t.scale >= 0 else -root for root, t in zip(roots, terms, strict=True)]
    a = together([_thin(t.pair.a, recipe, t) for t in terms], signed, elects=elects)
    b = together([_thin(t.pair.b / np.float32(t.scale), recipe, t) for t in terms], roots, elects=elects)
    return LoraPair(a, b)


def _thin(tensor: np.ndarray, recipe: Recipe, term: _Term) -> np.ndarray:
    return tensor if recipe.way.thins is None else thin(tensor, recipe.way.thins, recipe.density, term.draw)


def _draw(seed: int, number: int, module: str) -> np.random.Generator:
    """One for each adapter and layer: what is dropped of one does not hang on which others there are."""
    return np.random.default_rng([seed, number, zlib.crc32(module.encode())])


def _scale(adapter: Adapter, module: str, pair: LoraPair) -> float:
    """α/r of a layer, as far as its file tells: 1 where that holds no B of which the pair's is a multiple."""
    raw = adapter.tensors[module].get("lora_B")
    if raw is None or raw.shape != pair.b.shape or not raw.any():
        return 1.0
    raw = raw.astype(np.float64)
    return float(np.vdot(raw, pair.b) / np.vdot(raw, raw)) or 1.0


# -- what is refused ----------------------------------------------------------------------------------------------

MERGE_FIRST = "merge it into its base first (`edgelora merge`), and train or compose the others over that one"


def _require_sense(recipe: Recipe) -> None:
    if recipe.how not in HOWS:
        near = difflib.get_close_matches(recipe.how, HOWS, 1)
        raise ConfigError(
            what=f"--how {recipe.how}" + (f", did you mean {near[0]}?" if near else ""),
            why="no way to compose is called so",
            fix=f"one of {', '.join(HOWS)}",
        )
    if not 0 < recipe.density <= 1:
        raise ConfigError(
            what=f"--density {recipe.density:g}",
            why="it is the share of entries that is kept: more than 0, at most 1",
            fix="pass one such as --density 0.5",
        )
    if recipe.rank is not None and recipe.rank < 1:
        raise ConfigError(f"--rank {recipe.rank}", "a LoRA has a rank of at least 1", "pass one such as --rank 16")


def _require_composable(parts: Sequence[Part], recipe: Recipe, linears: Shapes) -> int:
    """Raise unless `parts` can be composed so. Returns the largest rank that is put in, or the one asked for."""
    if others := {part.name: found for part in parts if (found := _other_than_pairs(part.adapter, linears))}:
        raise _no_pairs(others)
    ranks = {
        module: {p.name: p.adapter.pair(module).rank for p in parts if module in p.adapter.tensors}
        for module in linears
    }  # fmt: skip
    ranks = {module: found for module, found in ranks.items() if found}
    largest = recipe.rank or max(rank for found in ranks.values() for rank in found.values())
    small = [module for module in ranks if recipe.rank is not None and recipe.rank > min(linears[module])]
    if small:
        raise ConfigError(
            what=f"--rank {recipe.rank}: {some([f'{module} is {linears[module]}' for module in small])}",
            why="no matrix has a rank above the smaller of its sides",
            fix=f"pass at most --rank {min(min(linears[module]) for module in ranks)}",
        )
    if recipe.way.factors:
        _require_equal_ranks(ranks, recipe)
    if recipe.how != "sum" and len(parts) > 1 and all(len(found) == 1 for found in ranks.values()):
        raise AdapterError(
            what=f"{' and '.join(part.name for part in parts)}: they have no layer in common",
            why=f"{recipe.how} settles what adapters do to the same weights, and these never meet",
            fix="pass --how sum, which is exact for them",
        )
    return largest


def _require_equal_ranks(ranks: Mapping[str, Mapping[str, int]], recipe: Recipe) -> None:
    unequal = [
        f"{module} has {', '.join(f'{rank} in {name}' for name, rank in found.items())}"
        for module, found in ranks.items()
        if len(set(found.values())) > 1
    ]
    if unequal:
        other = "sum" if recipe.how == "linear" else recipe.how.removesuffix("_factors")
        raise AdapterError(
            what=f"unequal ranks: {some(unequal)}",
            why=f"{recipe.how} adds up A and B entry by entry",
            fix=f"pass --how {other}, which works on B A and takes any ranks",
        )


def _other_than_pairs(adapter: Adapter, linears: Shapes) -> tuple[str, str] | None:
    """Why an adapter is not changes B A alone, and what to do with it; None: it is."""
    if adapter.invocation:
        alone = "export it by itself (`edgelora export`), and chat with that over the base"
        return "it acts from its invocation on, not on every token", alone
    if adapter.kind.of_input:
        return adapter.kind.of_input, IN_TORCH
    if adapter.token_rows:
        return f"it puts other rows in {' and '.join(adapter.token_rows)} for some tokens", MERGE_FIRST
    if others := [module for module in adapter.tensors if module not in linears]:
        return f"it changes {some(others, 3)}, no linear layer", MERGE_FIRST
    for module in adapter.tensors:
        try:
            pair = adapter.pair(module)
        except AdapterError as e:
            return f"{e.what} ({e.why})", MERGE_FIRST
        if pair.magnitude is not None:
            return "a DoRA scales the rows of the base's weights as well", MERGE_FIRST
    return None


def _no_pairs(others: Mapping[str, tuple[str, str]]) -> AdapterError:
    """The error for adapters that cannot be composed, by their names, with why and what to do with each."""
    reasons = [why if len(others) == 1 else f"{name}: {why}" for name, (why, _) in others.items()]
    return AdapterError(
        what="; ".join(f"{name}: it cannot be composed" for name in others),
        why=f"{'; '.join(reasons)}, and what is composed are changes B A",
        fix="; or ".join(dict.fromkeys(fix for _, fix in others.values())),
    )
