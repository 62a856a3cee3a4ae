"""Identity preference optimization: the chosen answer must gain a fixed margin over the rejected one, and no more."""

from __future__ import annotations

from torch import Tensor

from edgelora.data.pack import Batch
from edgelora.nn.decoder import Decoder
from edgelora.training.objectives.log_p import log_ratios
from edgelora.training.objectives.objective import Scored, Settings
from edgelora.training.objectives.pairs import PairObjective, shown, two


class IPO(PairObjective):
    """(h_w/|y_w| − h_l/|y_l| − 1/2β)² with h as in DPO and |y| the tokens of an answer (equation 17, β is its τ).

    The paper writes h without |y|; its authors ran it with the mean over tokens, which is what TRL computes too, so
    that the margin does not depend on how long answers are. The loss of a step is the mean over its pairs. An adapter
    that does nothing has the loss (1/2β)².
    """

    name = "ipo"
    paper = "arXiv:2310.12036"

    def loss(self, decoder: Decoder, batch: Batch, settings: Settings) -> Scored:
        ratios, policy = log_ratios(decoder, batch)
        losses = margin_losses(ratios / policy.tokens, settings.beta)
        return Scored(losses.sum(), shown(settings.beta * ratios, policy.log_p))


def margin_losses(ratios: Tensor, beta: float) -> Tensor:
    """Mean log ratios a token (2n,) of chosen and rejected answers in turn → the loss of each pair (n,)."""
    chosen, rejected = two(ratios)
    return (chosen - rejected - 1 / (2 * beta)).square()
