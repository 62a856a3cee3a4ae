"""Odds ratio preference optimization: learn the chosen answers, and make them likelier than the rejected ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgelora.data.pack import Batch
from edgelora.nn.decoder import Decoder
from edgelora.training.objectives.log_p import answer_tokens, answers
from edgelora.training.objectives.objective import Mean, Scored, Settings
from edgelora.training.objectives.pairs import PairObjective, shown, two


class ORPO(PairObjective):
    """L_SFT − β log σ(log odds(y_w) − log odds(y_l)), with no reference model (equations 6 and 7; β is their λ).

    odds = P / (1 − P) of P(y|x) = exp(mean log p over the tokens of the answer) (equation 3). A step's loss is

        Σ −log p over the tokens of its chosen answers / their number  −  β Σ log σ(…) over its pairs / their number

    so the first term is what `sft` minimises on the chosen answers: a mean over tokens, as TRL takes it over the batch.
    TRL counts the tokens of the prompt in that term; here, as everywhere, the assistant's words alone are learned.
    """

    name = "orpo"
    paper = "arXiv:2403.07691"
    shows = ("nll_loss", "log_odds_ratio", "log_odds_chosen", *PairObjective.shows)

    def step_mean(self, _decoder: Decoder, batches: Sequence[Batch]) -> Mean:
        """Tokens of a chosen answer: it turns a mean over tokens into one over pairs, whatever the micro-batches."""
        return Mean(sum(_chosen_tokens(batch) for batch in batches), sum(map(self.units, batches)))

    def loss(self, decoder: Decoder, batch: Batch, settings: Settings) -> Scored:
        policy = answers(decoder, batch)
        chosen, _ = two(policy.log_p)
        mean_log_p = policy.log_p / policy.tokens
        log_odds = log_odds_ratios(mean_log_p)
        preferred = F.logsigmoid(log_odds)
        loss = -chosen.sum() / settings.step_mean - settings.beta * preferred.sum()
        nll, ratio, odds = torch.stack([-chosen.sum(), preferred.sum(), log_odds.sum()]).detach().tolist()
        numbers = {
            "nll_loss": Mean(nll, _chosen_tokens(batch)),
            "log_odds_ratio": Mean(ratio, len(chosen)),
            "log_odds_chosen": Mean(odds, len(chosen)),
        }
        return Scored(loss, numbers | shown(settings.beta * mean_log_p, mean_log_p))


def _chosen_tokens(batch: Batch) -> float:
    return float(answer_tokens(batch)[0::2].sum())


def log_odds_ratios(mean_log_p: Tensor) -> Tensor:
    """Mean log p a token (2n,) of chosen and rejected answers in turn → log odds ratio of each pair (n,)."""
    # log P − log(1 − P). An answer that is certain to the last bit would have infinite odds and no gradient
    log_p = mean_log_p.clamp(max=-torch.finfo(mean_log_p.dtype).eps)
    chosen, rejected = two(log_p - torch.log(-torch.expm1(log_p)))
    return chosen - rejected
