"""Rank, α and learning rate where they are left to us: by the base's size, the method and the objective, with sources.

Starting points, not optima: `edgelora train --sweep` finds those on the data at hand.
"""

from __future__ import annotations

from typing import NamedTuple

from edgelora.config import Method, Objective, TrainConfig
from edgelora.device import Choice
from edgelora.errors import ConfigError
from edgelora.peft.methods import METHODS
from edgelora.training import galore

RANK, SCALE_AT_RANK = 16, 2.0  # α/r at this rank, whatever the method; what it is at others differs
RANKS: dict[Method, int] = {"vera": 256, "alora": 32, "galore": galore.RANK}
SMALL, LARGE = 1e9, 14e9  # weights; QLoRA's border is "larger than 13B", and models of that class have up to 14


class Rate(NamedTuple):
    """A learning rate, or the share that is left of one; `why` is "" where there is nothing to say."""

    value: float
    why: str


# Peak learning rates of AdamW for a LoRA that is fine-tuned on answers.
SMALL_RATE = Rate(
    1e-3,
    "ten times full fine-tuning's (LoRA Without Regret, Thinking Machines 2025): their rule for a width d, "
    "10 · 5e-5 · (2000/d)^0.78, gives 1.3e-3 to 9e-4 for models below 1B, 576 to 960 wide",
)
MIDDLE_RATE = Rate(
    2e-4,
    "QLoRA's for 7B and 13B over 4-bit weights (arXiv:2305.14314, appendix B), Unsloth's and Axolotl's recipes from 1B",
)
LARGE_RATE = Rate(1e-4, "QLoRA's for 33B and 65B (arXiv:2305.14314, appendix B)")

# Of AdamW for what stands before prompts, below 1B weights and from there on: it is no small change of a weight.
GUIDE = Rate(3e-2, "PEFT's guide to prompt-based methods, for all of them over bloomz-560m")
COMPARED = "PEFT's comparison on Llama-3.2-3B (github.com/huggingface/peft, method_comparison), "
ENCODED = Rate(5e-4, f"for the weights of an encoder: {COMPARED}P-tuning with an MLP and 20 tokens")
TRIED = "for the weights of an encoder, with which 30 steps over SmolLM2-135M learned the most of those tried, "
VIRTUAL_RATES: dict[Method, tuple[Rate, Rate]] = {
    "prompt_tuning": (GUIDE, Rate(1e-3, f"{COMPARED}begun as tokens of the vocabulary")),
    "prefix_tuning": (GUIDE, Rate(5e-3, f"{COMPARED}begun as keys and values of a text")),
    "p_tuning": (Rate(1e-2, f"{TRIED}3e-4 to 1e-2"), ENCODED),
}
PROJECTED: dict[Method, tuple[Rate, Rate]] = {"prefix_tuning": (Rate(3e-3, f"{TRIED}5e-4 and 3e-3"), ENCODED)}

# Of AdamW for what is trained in the place of a LoRA's pairs, whatever the size of the base: the authors' or PEFT's.
RATES: dict[Method, Rate] = {
    "vera": Rate(
        2e-2,
        "PEFT's example, over RoBERTa (github.com/huggingface/peft, examples/sequence_classification/VeRA.ipynb); "
        "of 1e-3, 4e-3 and this, 30 steps over SmolLM2-135M learned the most with it",
    ),
    "ia3": Rate(3e-3, "T-Few's for an IA3, over T0 with Adafactor (arXiv:2205.05638, github.com/r-three/t-few)"),
    "bitfit": Rate(1e-3, "the authors' for biases, over BERT (arXiv:2106.10199, github.com/benzakenelad/BitFit)"),
    "lora_xs": Rate(
        4e-3,
        "the authors' over Mistral-7B; over Llama-3-8B 2e-3 (arXiv:2405.17604, github.com/MohammadrezaBanaei/LoRA-XS)",
    ),
    "houlsby": Rate(
        3e-4, "the authors' example, over BERT (arXiv:1902.00751, github.com/google-research/adapter-bert)"
    ),
}
BORROWED: tuple[Method, ...] = ("layernorm", "token_rows", "lorma", "replora", "glora")
NO_SOURCE = "a LoRA's, for want of a source on this method: "

# What is left of it for preferences: such losses only nudge a model that can answer already.
OBJECTIVE_SHARE: dict[Objective, Rate] = {
    "sft": Rate(1.0, ""),
    "dpo": Rate(1 / 40, "a fortieth for DPO (TRL's and Unsloth's recipes: 5e-6 where answers take 2e-4)"),
    "ipo": Rate(1 / 40, "a fortieth for IPO, as for DPO (TRL's and Unsloth's recipes: 5e-6 where answers take 2e-4)"),
    "kto": Rate(1 / 40, "a fortieth for KTO (its best is like DPO's, says TRL's recipe)"),
    "orpo": Rate(0.4, "two fifths for ORPO (TRL's recipe for a LoRA: 8e-5 where answers take 2e-4)"),
}

LION_SHARE = Rate(
    1 / 5, "a fifth for Lion, whose steps are larger: 3 to 10 times lower than AdamW's (arXiv:2302.06675)"
)

WHOLE_SHARE = Rate(1 / 10, "a tenth for all weights: what full fine-tuning takes of a LoRA's (LoRA Without Regret)")


def choose(config: TrainConfig, n_weights: int) -> tuple[TrainConfig, dict[str, Choice]]:
    """`config` with rank, alpha and learning rate filled in where they are None, and why each was chosen.

    n_weights: of the whole base. How they are stored makes no difference: QLoRA found the rates of 16-bit LoRA to hold
    over 4-bit weights, and no source says otherwise below. Raises ConfigError for a rank or an α that the method has
    not: the run's settings have both all the same, and nobody is told why.
    """
    _require_taken(config)
    values: dict[str, float] = {}
    choices: dict[str, Choice] = {}
    rank = config.rank
    if rank is None:
        values["rank"] = rank = RANKS.get(config.method, RANK)
        choices["rank"] = Choice(str(rank), _why_rank(config.method))
    if config.alpha is None:
        values["alpha"], why = _alpha(config.method, rank)
        choices["alpha"] = Choice(f"{values['alpha']:g}", why)
    if config.learning_rate is None:
        values["learning_rate"], why = _learning_rate(config, n_weights)
        choices["learning_rate"] = Choice(f"{values['learning_rate']:g}", why)
    if not METHODS[config.method].ranked:
        choices.pop("rank", None)
        choices.pop("alpha", None)
    return config.model_copy(update=values), choices


def _require_taken(config: TrainConfig) -> None:
    given = {"--rank": config.rank, "--alpha": config.alpha}
    said = [f"{option} {value:g}" for option, value in given.items() if value is not None]
    if said and not METHODS[config.method].ranked:
        raise ConfigError(
            what=f"--method {config.method} {' '.join(said)}: it has neither a rank nor an α",
            why=f"it trains {METHODS[config.method].trains}",
            fix=f"leave {' and '.join(option.split()[0] for option in said)} away, or choose a method that has them",
        )


def _why_rank(method: Method) -> str:
    if method == "dora":
        return "as good as 32 for LLaMA2-7B and LLaMA3-8B (tables of DoRA's repository, github.com/NVlabs/DoRA)"
    if method == "galore":
        return (
            "the authors' example: Adam's moments are those of as many directions of each gradient (arXiv:2403.03507, "
            "github.com/jiaweizzhao/GaLore)"
        )
    if method == "alora":
        return "PEFT's example of an aLoRA (github.com/huggingface/peft, examples/alora_finetuning)"
    if method == "vera":
        return "PEFT's default: a VeRA trains one number for each rank, not a row and a column (arXiv:2310.11454)"
    return (
        "on data sets of this kind the rank hardly matters once all layers are adapted (QLoRA, arXiv:2305.14314, "
        "figure 4; LoRA Without Regret); Unsloth's recipes take 16 or 32"
    )


def _alpha(method: Method, rank: int) -> tuple[float, str]:
    if method == "rslora":
        alpha = SCALE_AT_RANK * RANK**0.5
        return (
            alpha,
            f"α/√r is {SCALE_AT_RANK:g} at r {RANK}, as a LoRA's, and holds gradients steady (arXiv:2312.03732)",
        )
    if method == "dora":
        return SCALE_AT_RANK * rank, "twice the rank, as in DoRA's own runs (arXiv:2402.09353, github.com/NVlabs/DoRA)"
    if method == "galore":
        return galore.SCALE, "GaLore's α, which multiplies each step: the authors' (arXiv:2403.03507)"
    if method == "vera":
        return 1.0, "a VeRA has none: its vectors are the scale"
    if method == "houlsby":
        return 1.0, "Houlsby's adapters have none: what they add is not scaled"
    if method == "glora":
        return 1.0, "a GLoRA has none: its paths are the scale"
    return SCALE_AT_RANK * RANK, "one α for all ranks: the best learning rate then stays the same (LoRA Without Regret)"


def _peak(config: TrainConfig, n_weights: int) -> Rate:
    """Of the method and the size alone."""
    virtual = VIRTUAL_RATES | PROJECTED if config.prefix_projection else VIRTUAL_RATES
    if config.method in virtual:
        return virtual[config.method][n_weights >= SMALL]
    if config.method in RATES:
        return RATES[config.method]
    rate = SMALL_RATE if n_weights < SMALL else MIDDLE_RATE if n_weights < LARGE else LARGE_RATE
    return Rate(rate.value, NO_SOURCE + rate.why) if config.method in BORROWED else rate


def _learning_rate(config: TrainConfig, n_weights: int) -> tuple[float, str]:
    base = _peak(config, n_weights)
    shares = [OBJECTIVE_SHARE[config.objective]]
    if config.optimizer == "lion":
        shares.append(LION_SHARE)
    if config.method in ("full", "galore"):
        shares.append(WHOLE_SHARE)
    if config.method == "galore":
        scale = config.alpha or galore.SCALE
        shares.append(Rate(1 / scale, f"over α {scale:g}, by which GaLore multiplies it again"))
    if config.method == "loraplus":
        share = config.loraplus_ratio**-0.5
        shares.append(
            Rate(share, f"{share:.2g} of it for A, as B learns faster by as much (PEFT's example: 5e-5 with 16)")
        )
    if config.method == "dora" and n_weights >= SMALL:
        shares.append(Rate(1.0, "DoRA's own runs over 7B and 8B took 1e-4 to 2e-4"))
    value = base.value
    for share in shares:
        value *= share.value
    return float(f"{value:.3g}"), "; ".join([base.why, *(share.why for share in shares if share.why)])
