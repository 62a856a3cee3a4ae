"""Direct preference optimization: the chosen answer must gain on the frozen model more than the rejected one."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edgelora.data.pack import Batch
from edgelora.nn.decoder import Decoder
from edgelora.training.objectives.log_p import log_ratios
from edgelora.training.objectives.objective import Scored, Settings
from edgelora.training.objectives.pairs import PairObjective, shown, two


class DPO(PairObjective):
    """−log σ(β(h_w − h_l)) with h = log π(y|x) − log π_ref(y|x), summed over the tokens of an answer (equation 7).

    The loss of a step is the mean over its pairs. An adapter that does nothing has the loss log 2.
    """

    name = "dpo"
    paper = "arXiv:2305.18290"

    def loss(self, decoder: Decoder, batch: Batch, settings: Settings) -> Scored:
        ratios, policy = log_ratios(decoder, batch)
        return Scored(sigmoid_losses(ratios, settings.beta).sum(), shown(settings.beta * ratios, policy.log_p))


def sigmoid_losses(ratios: Tensor, beta: float) -> Tensor:
    """Log ratios (2n,) of chosen and rejected answers in turn → the loss of each pair (n,)."""
    chosen, rejected = two(ratios)
    return -F.logsigmoid(beta * (chosen - rejected))
