"""Rank, α and learning rate of a method where nobody says them, each with its source: a LoRA's, and how others differ.

What is special to a method stands in its own file, in the words that are here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

RANK, SCALE_AT_RANK = 16, 2.0  # α/r at this rank, whatever the method; what it is at others differs
SMALL, LARGE = 1e9, 14e9  # weights; QLoRA's border is "larger than 13B", and models of that class have up to 14


class Sourced(NamedTuple):
    """A number, or the share that is left of one, and who recommends it; `why` is "" where there is nothing to say."""

    value: float
    why: str


Rate: TypeAlias = Callable[[float], Sourced]
"""The peak learning rate of AdamW over a base of so many weights, fine-tuned on answers."""

_SMALL_RATE = Sourced(
    1e-3,
    "ten times full fine-tuning's (LoRA Without Regret, Thinking Machines 2025): their rule for a width d, "
    "10 · 5e-5 · (2000/d)^0.78, gives 1.3e-3 to 9e-4 for models below 1B, 576 to 960 wide",
)
_MIDDLE_RATE = Sourced(
    2e-4,
    "QLoRA's for 7B and 13B over 4-bit weights (arXiv:2305.14314, appendix B), Unsloth's and Axolotl's recipes from 1B",
)
_LARGE_RATE = Sourced(1e-4, "QLoRA's for 33B and 65B (arXiv:2305.14314, appendix B)")
NO_SOURCE = "a LoRA's, for want of a source on this method: "


def of_a_lora(n_weights: float) -> Sourced:
    """By the size of the base. How its weights are stored makes no difference: QLoRA found the rates of 16-bit LoRA to
    hold over 4-bit weights, and no source says otherwise below."""
    return _SMALL_RATE if n_weights < SMALL else _MIDDLE_RATE if n_weights < LARGE else _LARGE_RATE


def borrowed(n_weights: float) -> Sourced:
    """A LoRA's, of a method on which no source is known."""
    rate = of_a_lora(n_weights)
    return Sourced(rate.value, NO_SOURCE + rate.why)


def share_of_a_lora(share: float, why: str) -> Rate:
    """Of a method that moves weights faster or more slowly than a LoRA does at the same rate."""
    return lambda n_weights: Sourced(share * of_a_lora(n_weights).value, why)


def always(value: float, why: str) -> Rate:
    """Whatever the size of the base: of what is trained in the place of a LoRA's pairs."""
    return lambda _: Sourced(value, why)


def by_size(below: Sourced, above: Sourced) -> Rate:
    """1B weights: of what is no small change of a weight, such as what stands before prompts."""
    return lambda n_weights: below if n_weights < SMALL else above


# Sources that several methods before prompts share.
GUIDE = Sourced(3e-2, "PEFT's guide to prompt-based methods, for all of them over bloomz-560m")
COMPARED = "PEFT's comparison on Llama-3.2-3B (github.com/huggingface/peft, method_comparison), "
ENCODED = Sourced(5e-4, f"for the weights of an encoder: {COMPARED}P-tuning with an MLP and 20 tokens")
MOST = "with which 40 steps over SmolLM2-135M learned the most of those tried (docs/methods.md)"
TRIED = "for the weights of an encoder, with which 30 steps over SmolLM2-135M learned the most of those tried, "

_RANK = Sourced(
    RANK,
    "on data sets of this kind the rank hardly matters once all layers are adapted (QLoRA, arXiv:2305.14314, "
    "figure 4; LoRA Without Regret); Unsloth's recipes take 16 or 32",
)
_ONE_ALPHA = Sourced(
    SCALE_AT_RANK * RANK, "one α for all ranks: the best learning rate then stays the same (LoRA Without Regret)"
)


def no_alpha(why: str) -> Callable[[int], Sourced]:
    """Of a method that scales by nothing of the kind."""
    return lambda _: Sourced(1.0, why)


@dataclass(frozen=True)
class Defaults:
    """Of one method."""

    rank: Sourced = _RANK
    alpha: Callable[[int], Sourced] = lambda _: _ONE_ALPHA
    """By the rank."""
    rate: Rate = of_a_lora
    rate_of_projection: Rate | None = None
    """In the place of `rate` with `prefix_projection`, which trains an encoder."""


LORA, BORROWED = Defaults(), Defaults(rate=borrowed)
