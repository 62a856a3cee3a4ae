"""GLoRA (arXiv:2306.07967): W′ = W + W ∘ A + B and, in a layer that has a bias c, c′ = c + D ∘ c + E + W C.

Of the supports that the paper searches among, these are here, as PEFT's config_A_B = lora, config_C = config_D_E =
vector: A = A_d A_u and B = B_d B_u, (d_out, r) times (r, d_in) each; C (d_in,), D and E (d_out,). W ∘ A is taken by
elements, as the authors' code and PEFT do, whatever the W A of the paper's text; of full rank, it can only be merged.
Nobody searches: every layer has all of them. C, D and E come to one vector, which is saved as E, with C and D zero:
exact, for c and W stay. As in PEFT a layer without a bias gets none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Linear, Weight
from edgelora.nn.linear import product as plain
from edgelora.peft import remade
from edgelora.peft.defaults import Defaults, borrowed, no_alpha
from edgelora.peft.lora import fresh_pair

DEFAULTS = Defaults(alpha=no_alpha("a GLoRA has none: its paths are the scale"), rate=borrowed)


class Path(nn.Module):
    """Xd (d_out, r) and Xu (r, d_in), whose product it is."""

    def __init__(self, d: Tensor, u: Tensor) -> None:
        super().__init__()
        self.Xd, self.Xu = nn.Parameter(d), nn.Parameter(u)


class OfBias(nn.Module):
    """C (d_in,), D and E (d_out,): c′ = c + D ∘ c + E + W C. All zero at first."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.C, self.D, self.E = (nn.Parameter(torch.zeros(n)) for n in (shape[1], shape[0], shape[0]))

    def forward(self, bias: Tensor, weight: Weight) -> Tensor:
        through: Tensor = plain(self.C[None], weight)[0]
        return bias + self.D * bias + self.E + through


class GloraDelta(nn.Module):
    """The paths A and B, float32, are trained; where the layer has a bias (`and_bias`) C, D and E too."""

    factors = None

    def __init__(self, a: Path, b: Path) -> None:
        super().__init__()
        self.A, self.B = a, b
        self.bias: OfBias | None = None
        self.linear: tuple[Linear] | None = None  # in a tuple: the layer is no part of its delta

    def and_bias(self, linear: Linear) -> None:
        """Train what becomes of this layer's bias, too."""
        self.bias, self.linear = OfBias(linear.weight.shape), (linear,)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        return remade.product(x, weight, TimesPlus, self.A.Xd, self.A.Xu, self.B.Xd, self.B.Xu)

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or self.bias is None or self.linear is None:
            return bias
        new: Tensor = self.bias(bias, self.linear[0].weight)
        return new

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """By PEFT's names. C, D and E as one vector E that does the same here, or none."""
        saved = {f"glora_{n}.{key}": p.detach() for n in "AB" for key, p in getattr(self, n).named_parameters()}
        column, bias = torch.zeros(self.A.Xu.shape[1], 1), torch.zeros(len(self.A.Xd))
        if self.bias is None or self.linear is None:
            return saved | {"glora_C.zeros": column, "glora_D.zeros": bias, "glora_E.zeros": bias.clone()}
        (linear,) = self.linear
        assert linear.bias is not None
        moved = self.bias(linear.bias, linear.weight) - linear.bias
        return saved | {"glora_C.X": column, "glora_D.X": bias, "glora_E.X": moved}


class TimesPlus:
    """W′ = W ∘ (1 + A_d A_u) + B_d B_u (a `remade.Rule`)."""

    @staticmethod
    def weight(w: Tensor, out: Tensor, *parameters: Tensor) -> None:
        a_d, a_u, b_d, b_u = parameters
        torch.mul(w, (a_d @ a_u).add_(1), out=out)
        out.addmm_(b_d, b_u)

    @staticmethod
    def gradients(w: Tensor, g: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        a_d, a_u, b_d, b_u = parameters
        d_b = g @ b_u.T, b_d.T @ g
        g.mul_(w)
        return g @ a_u.T, a_d.T @ g, *d_b


def fresh(weight: Weight, rank: int, _: float, generator: torch.Generator) -> GloraDelta:
    """A_u and B_u as a LoRA's A, A_d and B_d zero, as PEFT: it does nothing yet. It has no α."""
    a, b = (Path(d, u) for u, d in (fresh_pair(weight.shape, rank, generator) for _ in "AB"))
    return GloraDelta(a, b)


def and_bias(delta: object, linear: Linear) -> None:
    """What a layer with a bias has besides (`Method.with_bias`)."""
    assert isinstance(delta, GloraDelta)
    delta.and_bias(linear)
