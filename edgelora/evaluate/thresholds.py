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


FLOATS = Limits(1e-4, 1.0, 0.05)
THRESHOLDS: dict[Type, Limits] = {Type.F32: FLOATS, Type.F16: FLOATS, Type.BF16: Limits(1e-2, 1.0, 1.0)}
QUANTIZED = Limits(5e-2, 0.8, 0.5)


def limits_of(types: Iterable[Type]) -> Limits:
    """The limits of a file whose matrices have these types: the widest of them."""
    found = [THRESHOLDS.get(kind, QUANTIZED) for kind in types] or [FLOATS]
    return Limits(
        max(limits.kl_mean for limits in found),
        min(limits.same_top for limits in found),
        max(limits.flip_nats for limits in found),
    )
