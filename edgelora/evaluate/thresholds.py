"""How far llama.cpp may be from torch over the very same blocks, by the type of the weights: THE TABLE.

llama.cpp rounds the activations that it multiplies a weight with (to 8 bits over quantized weights); torch does not.
That rounding is all that may differ, so the limits follow from it, and not from how good the weights are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gguf.constants import GGMLQuantizationType

from edgelora.evaluate.fidelity import Fidelity

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Limits:
    """What a file may differ by: mean KL in nats, and either the share of equal tops or what a changed top cost."""

    kl_mean: float
    same_top: float
    flip_nats: float
    """Where another token came first, torch must have held it for this good at least (nats below its own first)."""

    def faults(self, found: Fidelity) -> list[str]:
        """What of `found` is beyond; empty if nothing. NaN is beyond everything."""
        faults = []
        if not found.kl_mean <= self.kl_mean:
            faults.append(f"mean KL {found.kl_mean:.2g}, allowed {self.kl_mean:.2g}")
        if not (found.same_top >= self.same_top or found.worst_flip_nats <= self.flip_nats):
            faults.append(f"same top {found.same_top:.1%}, allowed {self.same_top:.1%}")
        return faults


# Measured on an x86 CPU with llama.cpp 0c1e57098, mean KL and same top: over SmolLM2-135M, over a seeded model of two
# layers of one type alone, and over Gemma-3-270m on plain texts, whose activations reach far and lose most by rounding.
# With rotary rows in a wrong order the mean KL is 0.9 to 3.7 and the same top 14 to 39 %.
FLOATS = Limits(1e-4, 1.0, 0.05)  # activations stay floats: 4e-6, 3e-6, and no other top
BFLOATS = Limits(1e-2, 1.0, 1.0)  # they are rounded to 8 bits of mantissa: 2e-4, 4e-5; over larger models more
BLOCKS_OF_32 = Limits(0.15, 0.7, 0.3)  # 8-bit integers, a scale for 32: 6e-3 and 96 %, 6e-4, Gemma's Q8_0 3e-2 and 88 %
BLOCKS_OF_256 = Limits(0.25, 0.7, 0.3)  # a scale for 256: 8.5e-3 and 95 %, 1.4e-3, Gemma's Q4_K_M 5e-2 and 92 %
# So few bits leave a small model near chaos, where each rounding grows. SmolLM2-135M padded to 768 at Q2_K, perplexity
# 507 in torch and 498 in llama.cpp: 0.14 and 79 % on a text, up to 0.45 and 61 % on chats; wrong rows 2.4 and 23 %.
TWO_BITS = Limits(0.8, 0.45, 0.3)

THRESHOLDS: dict[Type, Limits] = {
    **dict.fromkeys((Type.F32, Type.F16), FLOATS),
    Type.BF16: BFLOATS,
    **dict.fromkeys(
        (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.MXFP4, Type.NVFP4, Type.Q1_0),
        BLOCKS_OF_32,
    ),
    **dict.fromkeys(
        (Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS),
        BLOCKS_OF_256,
    ),
    **dict.fromkeys(
        (Type.Q2_K, Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.TQ1_0, Type.TQ2_0),
        TWO_BITS,
    ),
}  # fmt: skip


def limits_of(types: Iterable[Type]) -> Limits:
    """The limits of a file whose matrices have these types: the widest of them."""
    found = [THRESHOLDS[kind] for kind in types] or [FLOATS]
    return Limits(
        max(limits.kl_mean for limits in found),
        min(limits.same_top for limits in found),
        max(limits.flip_nats for limits in found),
    )
