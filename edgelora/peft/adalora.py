"""AdaLoRA (arXiv:2303.10512): y = x Wᵀ + s (x Qᵀ ∘ λ) Pᵀ. P and Q are held orthogonal, so that λ says what a rank is
worth: all layers share a budget of ranks, and the least important go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Delta, Factors, Weight
from edgelora.peft.around import Around
from edgelora.peft.defaults import Defaults, share_of_a_lora
from edgelora.peft.dropout import all_of

DEFAULTS = Defaults(  # λ begins as zero between small P and Q: the first steps move W far less than a LoRA's do
    rate=share_of_a_lora(
        9,
        "nine times a LoRA's: of 1, 3, 9 and 27 times it, 160 steps over SmolLM2-135M learned the most with this, and "
        "their loss was twice as high with a LoRA's own; the authors' 1.2e-3 for RTE, with α/r 16, moves s λ about as "
        "fast (arXiv:2303.10512, github.com/QingruZhang/AdaLoRA)",
    )
)
START = 1.5  # ranks at first, for each one in the end (the paper's section 4.1)
DEVIATION = 0.02  # of P and Q at the start: as PEFT and the authors' code
SMOOTHING, ORTHOGONALITY = 0.85, 0.5  # β₁ = β₂ and γ: PEFT's defaults, within the paper's
WARM_UP, FINAL = 0.1, 0.3  # shares of the steps before the first rank goes, and behind the last
PARTS = ("lora_A", "lora_B", "lora_E")


class AdaloraDelta(nn.Module):
    """Trained, float32: Q = lora_A (r₀, d_in), P = lora_B (d_out, r₀), λ = lora_E (r₀, 1).

    Beside them each has its smoothed importance and how much that varies, and `pruned` (r₀,) says which ranks are gone.
    """

    pruned: Tensor

    def __init__(self, a: Tensor, b: Tensor, alpha: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.lora_E = nn.Parameter(a), nn.Parameter(b), nn.Parameter(torch.zeros(len(a), 1))
        self.scale = alpha / len(a)
        for part in PARTS:
            self.register_buffer(f"{part}_importance", torch.zeros_like(getattr(self, part).data))
            self.register_buffer(f"{part}_variation", torch.zeros_like(getattr(self, part).data))
        self.register_buffer("pruned", torch.zeros(len(a), dtype=torch.bool))

    @property
    def factors(self) -> Factors:
        return Factors(self.lora_A * self.lora_E, self.lora_B, self.scale)

    def left(self) -> list[int]:
        """The ranks that are not pruned; of a layer without any the first, which then is nothing."""
        return (~self.pruned).nonzero()[:, 0].tolist() or [0]

    def tensors(self) -> dict[str, Tensor]:
        """A LoRA of the ranks that are left. α/r grows as r shrinks, so P takes that back."""
        rows = self.left()
        a = (self.lora_A * self.lora_E).detach()[rows] * ~self.pruned[rows, None]
        return {"lora_A": a, "lora_B": self.lora_B.detach()[:, rows] * (len(rows) / len(self.pruned))}

    @torch.no_grad()
    def weigh(self) -> None:
        """Smooth what |w · ∂loss/∂w| says of every number (equations 8 to 10)."""
        for part in PARTS:
            parameter = getattr(self, part)
            importance, variation = getattr(self, f"{part}_importance"), getattr(self, f"{part}_variation")
            now = (parameter * parameter.grad).abs()
            importance.lerp_(now, 1 - SMOOTHING)
            variation.lerp_((now - importance).abs(), 1 - SMOOTHING)

    def scores(self) -> Tensor:
        """What each rank is worth (r₀,): of λ, and the means of its row of Q and column of P (equation 7)."""
        a, b, e = (getattr(self, f"{part}_importance") * getattr(self, f"{part}_variation") for part in PARTS)
        total: Tensor = e[:, 0] + a.mean(1) + b.mean(0)
        return total


class Budget(Around):
    """The orthogonality of P and Q, and the ranks that all layers may have, which fall by the cube of what is left."""

    @torch.no_grad()
    def regularize(self, deltas: Sequence[Delta]) -> None:
        """Add the gradient of γ times the mean of ‖Q Qᵀ − I‖ and ‖Pᵀ P − I‖ (Frobenius, as PEFT and the authors)."""
        own = all_of(deltas, AdaloraDelta)
        for delta in own:
            for parameter, rows in ((delta.lora_A, delta.lora_A), (delta.lora_B, delta.lora_B.T)):
                if parameter.grad is None:
                    continue
                off = rows @ rows.T - torch.eye(len(rows), device=rows.device)
                off /= torch.linalg.matrix_norm(off).clamp(min=1e-12)
                pull = 2 * off @ rows  # of both parts of each layer the mean
                parameter.grad.add_(pull if parameter is rows else pull.T, alpha=ORTHOGONALITY / (2 * len(own)))

    @torch.no_grad()
    def allot(self, deltas: Sequence[Delta], step: int, total: int) -> None:
        """Weigh every rank, and take λ from those beyond the budget; they may come back until the last is chosen."""
        own = all_of(deltas, AdaloraDelta)
        first, last = int(WARM_UP * total), total - int(FINAL * total)
        if step < last:
            for delta in own:
                delta.weigh()
        if first < step <= last:
            prune(own, budget(own, step, first, last))
        for delta in own:
            delta.lora_E.masked_fill_(delta.pruned[:, None], 0.0)


def budget(deltas: Sequence[AdaloraDelta], step: int, first: int, last: int) -> int:
    """How many ranks all layers may have together (equation 12)."""
    before = sum(len(delta.pruned) for delta in deltas)
    after = sum(target(len(delta.pruned)) for delta in deltas)
    return int(after + (before - after) * (1 - (step - first) / (last - first)) ** 3)


def prune(deltas: Sequence[AdaloraDelta], ranks: int) -> None:
    """Say which are gone, so that the `ranks` most important of all layers stay."""
    scores = [delta.scores() for delta in deltas]
    n_gone = sum(map(len, scores)) - ranks
    threshold = torch.cat(scores).kthvalue(n_gone).values if n_gone else -torch.inf
    for delta, own in zip(deltas, scores, strict=True):
        delta.pruned.copy_(own <= threshold)


def ranks(deltas: Mapping[str, Delta], _: object) -> dict[str, object]:
    """PEFT's setting of the ranks that are left in each layer."""
    left = {name: len(delta.left()) for name, delta in deltas.items() if isinstance(delta, AdaloraDelta)}
    return {"rank_pattern": left}


def ranks_at_first(rank: int) -> int:
    """r₀ for `rank` on average in the end."""
    return -int(-rank * START // 1)


def target(at_first: int) -> int:
    """The rank of which `at_first` is r₀."""
    return int(at_first / START)


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> AdaloraDelta:
    """λ is zero: it does nothing yet. `rank`: on average, in the end."""
    d_out, d_in = weight.shape
    a, b = (
        DEVIATION * torch.randn(shape, generator=generator)
        for shape in ((ranks_at_first(rank), d_in), (d_out, ranks_at_first(rank)))
    )
    return AdaloraDelta(a, b, alpha)
