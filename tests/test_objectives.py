"""Objectives: TRL's losses and gradients, the same for any size of micro-batch, with the adapter off as reference."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from same_tokens import IDS

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.data.encode import Example
from edgelora.data.pack import pack
from edgelora.data.preference import Labelled, Pair
from edgelora.errors import ConfigError, DataError
from edgelora.peft.inject import inject
from edgelora.training.objectives import OBJECTIVES, objective_of
from edgelora.training.objectives.dpo import sigmoid_losses
from edgelora.training.objectives.ipo import margin_losses
from edgelora.training.objectives.kto import prospect_losses
from edgelora.training.objectives.log_p import answers, token_nll
from edgelora.training.objectives.micro_batches import BATCH_COST, fit
from edgelora.training.objectives.objective import Settings, added, held_out, mean_losses, means, over_all
from edgelora.training.objectives.orpo import log_odds_ratios

# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEM = [5, 6, 7, 8, 9]  # what all prompts begin with
PAIRED = ["dpo", "ipo", "orpo"]


def config(objective="sft", **changes):
    return TrainConfig(base="-", data="-", out="-", objective=objective, **changes)


def ids(draw, n):
    return draw.integers(10, 512, n).tolist()


def example(prompt, answer):
    return Example(np.array(prompt + answer), np.arange(len(prompt) + len(answer)) >= len(prompt))


def texts(n=5, prompt=None, seed=3):
    """(prompt, one answer, another) as ids, of unequal lengths. `prompt`: its length, where all have the same."""
    draw = np.random.default_rng(seed)
    return [
        (
            SYSTEM + ids(draw, draw.integers(3, 12)) if prompt is None else ids(draw, prompt),
            ids(draw, draw.integers(1, 15)),
            ids(draw, draw.integers(1, 15)),
        )
        for _ in range(n)
    ]


def rows_for(name, given=None):
    """Rows as the objective takes them."""
    given = texts() if given is None else given
    if name == "sft":
        return [example(prompt, chosen) for prompt, chosen, _ in given]
    if name == "kto":
        return [Labelled(example(p, a if i % 3 else b), bool(i % 3)) for i, (p, a, b) in enumerate(given)]
    return [Pair(example(prompt, chosen), example(prompt, rejected)) for prompt, chosen, rejected in given]


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def fresh(base):
    """(decoder, parameters): an adapter that does nothing yet."""
    decoder = build_decoder(base)
    return decoder, inject(decoder, "lora", rank=4, alpha=8, seed=0)


@pytest.fixture
def adapted(fresh):
    """The same, with B random, so that policy and reference differ and A has a gradient too."""
    decoder, parameters = fresh
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return decoder, parameters


def step(name, decoder, parameters, rows, max_tokens=4096, **changes):
    """(loss, numbers, gradients, number of micro-batches) of a whole step."""
    batches = OBJECTIVES[name].pack(rows, max_tokens)
    scored, loss = [], 0.0
    for part in mean_losses(OBJECTIVES[name], decoder, batches, config(name, **changes)):
        part.loss.backward()
        scored.append(part)
        loss += float(part.loss.detach())
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return loss, means(scored), gradients, len(batches)


def assert_same_gradients(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=0)


# -- TRL's losses of the same log-probabilities -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_trainer():
    """`trl_trainer(name, model, reference, beta)`: TRL's trainer with as much of it as its loss needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        trl = pytest.importorskip("trl", reason="pip install trl: the oracle of preference losses")
        orpo = pytest.importorskip("trl.experimental.orpo", reason="this trl has no ORPO")
    from accelerate import Accelerator

    def make(name, model, reference=None, beta=0.1):
        kind = {"dpo": trl.DPOTrainer, "ipo": trl.DPOTrainer, "kto": trl.KTOTrainer, "orpo": orpo.ORPOTrainer}[name]
        trainer = kind.__new__(kind)
        vars(trainer).update(
            model=model, ref_model=reference, beta=beta, accelerator=Accelerator(cpu=True), aux_loss_enabled=False,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None, device="cpu"), precompute_ref_logps=False,
            _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, ld_alpha=None,
            f_divergence_type="reverse_kl", loss_types=["ipo" if name == "ipo" else "sigmoid"], loss_weights=[1.0],
            use_weighting=False, label_smoothing=0.0, loss_type="kto", calculate_KL=True, desirable_weight=1.0,
            undesirable_weight=1.0, is_encoder_decoder=False, padding_value=0, _peft_has_been_casted_to_bf16=False,
        )  # fmt: skip
        return trainer

    return make


class Says(torch.nn.Module):
    """A model for TRL that answers each call with the next of the log-probabilities (B, T - 1) it was given."""

    is_gradient_checkpointing = False

    def __init__(self, *log_p):
        super().__init__()
        self.log_p = iter(log_p)

    def forward(self, **_):
        log_p = next(self.log_p)
        zeros = torch.zeros_like(log_p)
        return SimpleNamespace(log_probs=log_p, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def masks(lengths):
    """TRL's completion mask (B, T): one token of prompt, then an answer of each length."""
    return (torch.arange(max(lengths) + 1) <= torch.tensor(lengths)[:, None]).long().index_fill(1, torch.tensor([0]), 0)


LENGTHS = [3, 1, 8, 5, 2, 7]  # three chosen, three rejected answers


@pytest.fixture(scope="module")
def log_p():
    """(policy, reference): log p (6, T - 1) of each token of the answers, up to the ends of the curves."""
    generator = torch.Generator().manual_seed(0)
    made = [-20 * torch.rand(6, max(LENGTHS), generator=generator) * masks(LENGTHS)[:, 1:] for _ in range(2)]
    return made[0], made[1]


def in_turn(chosen_then_rejected):
    """TRL's order (chosen …, rejected …) → ours (chosen, rejected, chosen, rejected …)."""
    return torch.stack(chosen_then_rejected.chunk(2), 1).flatten()


@pytest.mark.parametrize("beta", [0.1, 0.8])
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_pair_losses_are_trls(trl_trainer, log_p, name, beta):
    policy, reference = log_p
    trainer = trl_trainer(name, Says(policy), Says(reference), beta)
    batch = {"input_ids": masks(LENGTHS), "attention_mask": masks(LENGTHS), "completion_mask": masks(LENGTHS)}
    ratios = in_turn((policy - reference).sum(1))
    if name == "dpo":
        ours = sigmoid_losses(ratios, beta)
    else:
        ours = margin_losses(ratios / in_turn(torch.tensor(LENGTHS)), beta)
    torch.testing.assert_close(ours.mean(), trainer._compute_loss(trainer.model, batch, False), atol=0, rtol=1e-6)


@pytest.mark.parametrize("log_p_scale", [1e-3, 0.1, 1.0, 5.0])
def test_log_odds_are_trls(trl_trainer, log_p, log_p_scale):
    mean_log_p = (log_p[0].sum(1) / torch.tensor(LENGTHS)) * log_p_scale
    theirs = trl_trainer("orpo", None, beta=0.3).odds_ratio_loss(*mean_log_p.chunk(2))
    ours = log_odds_ratios(in_turn(mean_log_p))
    torch.testing.assert_close(0.3 * torch.nn.functional.logsigmoid(ours), theirs[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.mean(), theirs[4], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25)])
@pytest.mark.parametrize("towards", [-1, 1])  # a KL estimate below 0 counts as 0
def test_kto_losses_are_trls(trl_trainer, log_p, towards, weights):
    policy, reference = log_p
    others = torch.rand(6, max(LENGTHS), generator=torch.Generator().manual_seed(2))
    trainer = trl_trainer("kto", Says(towards * others, policy), Says(0 * others, reference), beta=0.2)
    trainer.desirable_weight, trainer.undesirable_weight = weights
    desirable = torch.tensor([True, False, False, True, True, False])
    batch = {f"{kind}{key}": masks(LENGTHS) for kind in ("", "KL_")
             for key in ("input_ids", "attention_mask", "completion_mask")}  # fmt: skip
    theirs = trainer._compute_loss(trainer.model, batch | {"label": desirable}, False)
    kl = max(0.0, towards * float(others.sum(1).mean()))
    ours = prospect_losses((policy - reference).sum(1), desirable, kl, 0.2, weights)
    torch.testing.assert_close(ours.mean(), theirs, atol=0, rtol=1e-6)


# -- the whole path through transformers, PEFT and TRL ------------------------------------------------------------


@pytest.fixture
def twin(adapted, tiny, transformers_model):
    """(PEFT's model with the very same adapter, its parameters in the order of ours)."""
    decoder, parameters = adapted
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LINEARS)
    model = get_peft_model(transformers_model(tiny), lora).eval()
    theirs = dict(model.named_parameters())
    twins = []
    for name, parameter in decoder.named_parameters():
        module, _, part = name.partition(".delta.")
        twins.append(theirs[f"base_model.model.{module}.{part}.default.weight"])
        twins[-1].data.copy_(parameter.data)
    assert len(twins) == len(parameters) == sum(p.requires_grad for p in theirs.values())
    return model, twins


def fused(model):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


@pytest.mark.parametrize("beta", [0.1, 0.8])
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_pairs_through_trl(trl_trainer, adapted, twin, name, beta):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = DataCollatorForPreference(pad_token_id=0)([dict(zip(keys, row, strict=True)) for row in texts()])
    trainer = trl_trainer(name, fused(twin[0]), beta=beta)
    theirs = trainer._compute_loss(trainer.model, batch, False)
    loss, numbers, gradients, _ = step(name, *adapted, rows_for(name), beta=beta)
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert_same_gradients(gradients, torch.autograd.grad(theirs, twin[1]))
    assert len(numbers) == 6
    assert abs(numbers["rewards/margins"]) > 0
    for key, value in numbers.items():
        assert value == pytest.approx(trainer._metrics["eval"][key][0], rel=1e-4, abs=1e-5), key


def orpo_batch(given):
    """What TRL's trainer makes of texts: padded ids, masks, and labels of the answers alone."""
    batch = {}
    for kind, at in (("chosen", 1), ("rejected", 2)):
        whole = [torch.tensor(row[0] + row[at]) for row in given]
        labels = [torch.tensor([-100] * len(row[0]) + row[at]) for row in given]
        pad = torch.nn.utils.rnn.pad_sequence
        batch[f"{kind}_input_ids"] = pad(whole, batch_first=True)
        batch[f"{kind}_attention_mask"] = pad([torch.ones_like(w) for w in whole], batch_first=True)
        batch[f"{kind}_labels"] = pad(labels, batch_first=True, padding_value=-100)
    return batch


def test_orpo_through_trl(trl_trainer, adapted, twin):
    given = texts(prompt=1)  # TRL learns the prompt too, and of a single token there is nothing to learn
    trainer = trl_trainer("orpo", twin[0], beta=0.4)
    theirs, metrics = trainer.get_batch_loss_metrics(twin[0], orpo_batch(given))
    loss, numbers, gradients, _ = step("orpo", *adapted, rows_for("orpo", given), beta=0.4)
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert_same_gradients(gradients, torch.autograd.grad(theirs, twin[1]))
    assert len(numbers) == 9
    for key, value in numbers.items():
        assert value == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), key


def test_the_odds_of_orpo_through_trl_with_long_prompts(trl_trainer, adapted, twin):
    trainer = trl_trainer("orpo", twin[0], beta=0.4)
    _, metrics = trainer.get_batch_loss_metrics(twin[0], orpo_batch(texts()))
    _, numbers, _, _ = step("orpo", *adapted, rows_for("orpo"), beta=0.4)
    assert numbers.pop("nll_loss") != pytest.approx(metrics["nll_loss"], rel=1e-3)  # theirs is of the prompt too
    for key, value in numbers.items():
        assert value == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize(("seed", "above_0"), [(3, True), (0, False)])  # an estimate that counts, and one below 0
def test_kto_through_trl(trl_trainer, adapted, twin, seed, above_0, weights):
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    rows = rows_for("kto", texts(seed=seed))
    parts = [(r.example.input_ids[~r.example.loss_mask], r.example.input_ids[r.example.loss_mask]) for r in rows]
    given = [
        {"prompt_ids": prompt.tolist(), "completion_ids": answer.tolist(), "label": row.desirable,
         "KL_completion_ids": parts[i - 1][1].tolist()}
        for i, (row, (prompt, answer)) in enumerate(zip(rows, parts, strict=True))
    ]  # fmt: skip
    longest = max(len(row.example) for row in rows)
    trainer = trl_trainer("kto", fused(twin[0]), beta=0.3)
    trainer.desirable_weight, trainer.undesirable_weight = weights
    batch = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=longest)(given)
    theirs = trainer._compute_loss(trainer.model, batch, False)
    weigh = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    loss, numbers, gradients, _ = step("kto", *adapted, rows, beta=0.3, **weigh)
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert_same_gradients(gradients, torch.autograd.grad(theirs, twin[1]))
    assert (numbers["kl"] > 0) == above_0
    for key, value in numbers.items():
        assert value == pytest.approx(trainer._metrics["eval"][key][0], rel=1e-4, abs=1e-5), key


# -- what must hold of each ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_size_of_micro_batches_changes_nothing(adapted, name):
    rows = rows_for(name)
    whole, *others = (step(name, *adapted, rows, max_tokens) for max_tokens in (4096, 60, 16))
    assert whole[3] < others[-1][3]  # fewer micro-batches
    for loss, numbers, gradients, _ in others:
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert numbers == pytest.approx(whole[1], rel=1e-4, abs=1e-5)
        assert_same_gradients(gradients, whole[2])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_says_which_numbers_it_shows(adapted, name):
    objective = OBJECTIVES[name]
    (part,) = mean_losses(objective, adapted[0], objective.pack(rows_for(name), 4096), config(name))
    assert sorted(part.numbers) == sorted(objective.shows)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_make_the_step_of_one(adapted, name):
    decoder, parameters = adapted
    alone = step(name, decoder, parameters, rows_for(name), 16)
    objective, settings = OBJECTIVES[name], config(name)
    batches = objective.pack(rows_for(name), 16)
    halves = [batches[::2], batches[1::2]]
    sums = []
    for half in halves:  # what each has to tell the other
        next(mean_losses(objective, decoder, half, settings, lambda own: sums.append(own) or own))
    both = [sum(of) for of in zip(*sums, strict=True)]
    loss = sum(s.loss for half in halves for s in mean_losses(objective, decoder, half, settings, lambda _: both))
    assert float(loss.detach()) == pytest.approx(alone[0], rel=1e-5)
    assert_same_gradients(torch.autograd.grad(loss, parameters), alone[2])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_processes_show_the_numbers_of_one(adapted, name):
    """One of three has no micro-batch: it adds nothing, and as many numbers as the others."""
    objective, rows = OBJECTIVES[name], rows_for(name)
    scored = list(mean_losses(objective, adapted[0], objective.pack(rows, 16), config(name)))
    parts = [added({}, (s.numbers for s in mine)) for mine in (scored[::2], scored[1::2], [])]
    sent: list[list[float]] = []
    for part in parts:
        over_all(objective.shows, part, lambda mine: sent.append(mine) or mine)
    totals = [sum(of) for of in zip(*sent, strict=True)]
    assert over_all(objective.shows, {}, lambda _: totals) == pytest.approx(means(scored))


@pytest.mark.parametrize(
    ("name", "beta", "expected"),
    [("dpo", 0.1, math.log(2)), ("dpo", 2.0, math.log(2)), ("ipo", 0.1, 25.0), ("ipo", 0.5, 1.0), ("kto", 0.3, 0.5)],
)
def test_the_loss_of_an_adapter_that_does_nothing(fresh, name, beta, expected):
    loss, numbers, gradients, _ = step(name, *fresh, rows_for(name), beta=beta)
    assert loss == pytest.approx(expected, rel=1e-6)  # (1/2β)² for IPO
    shown = {key for key in numbers if key.startswith("rewards") or key == "kl"}
    assert len(shown) == 4  # of KTO the mean of the mismatched answers, for the others how often they are right
    assert {numbers[key] for key in shown} == {0.0}
    assert any(bool(gradient.any()) for gradient in gradients)  # and yet it learns


@pytest.mark.parametrize("name", PAIRED)
def test_swapping_the_answers_mirrors(adapted, name):
    rows = rows_for(name)
    loss, numbers, _, _ = step(name, *adapted, rows, beta=0.5)
    mirrored, swapped, _, _ = step(name, *adapted, [Pair(row.rejected, row.chosen) for row in rows], beta=0.5)
    for one, other in (("rewards/chosen", "rewards/rejected"), ("logps/chosen", "logps/rejected")):
        assert (numbers[one], numbers[other]) == pytest.approx((swapped[other], swapped[one]), rel=1e-4)
    assert swapped["rewards/margins"] == pytest.approx(-numbers["rewards/margins"], rel=1e-4)
    assert swapped["rewards/accuracies"] == pytest.approx(1 - numbers["rewards/accuracies"])
    if name == "dpo":  # −log σ(−x) + log σ(x) = x
        assert mirrored - loss == pytest.approx(numbers["rewards/margins"], rel=1e-4)
    if name == "orpo":
        assert swapped["log_odds_chosen"] == pytest.approx(-numbers["log_odds_chosen"], rel=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_learns(fresh, name):
    decoder, parameters = fresh
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    history = []
    for _ in range(6):
        loss, numbers, gradients, _ = step(name, decoder, parameters, rows_for(name))
        history.append((loss, numbers))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1][0] < history[0][0] * 0.9
    if name in PAIRED:
        assert history[-1][1]["rewards/margins"] > history[0][1]["rewards/margins"]
        assert history[-1][1]["rewards/accuracies"] == 1


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_the_adapter_is_on_again_after_a_fault(adapted, name, monkeypatch):
    decoder, parameters = adapted
    before = decoder.logits(IDS)
    batches = OBJECTIVES[name].pack(rows_for(name), 4096)
    monkeypatch.setattr(decoder, "nll", lambda *_: 1 / 0)  # in the reference, which goes first
    with pytest.raises(ZeroDivisionError):
        OBJECTIVES[name].loss(decoder, batches[0], Settings(beta=0.1))
    assert torch.equal(decoder.logits(IDS), before)
    assert all(a is b for a, b in zip(decoder.parameters(), parameters, strict=True))


def test_the_loss_does_not_depend_on_the_order_of_rows(adapted):
    rows = rows_for("dpo")
    loss, *_ = step("dpo", *adapted, rows)
    assert step("dpo", *adapted, rows[::-1])[0] == pytest.approx(loss, rel=1e-5)


def test_each_answer_is_summed_apart(adapted):
    decoder, _ = adapted
    examples = rows_for("sft")
    together = answers(decoder, pack(examples))
    for i, e in enumerate(examples):
        alone = -token_nll(decoder, pack([e])).sum()
        torch.testing.assert_close(together.log_p[i], alone, atol=0, rtol=1e-5)
        assert int(together.tokens[i]) == e.loss_mask.sum()


def test_weights_of_tokens_reach_every_sum(adapted):
    decoder, _ = adapted
    (whole,) = rows_for("sft", texts(1, prompt=4))
    learned, half = whole.loss_mask, whole.loss_mask & (np.arange(len(whole)) % 2 == 0)
    weighted = Example(whole.input_ids, learned, weights=np.where(half, 3.0, learned * 0.5).astype(np.float32))
    found = answers(decoder, pack([weighted, whole]))
    nll = token_nll(decoder, pack([whole])).detach().numpy()
    weights = weighted.weights[learned]
    assert found.log_p.detach().numpy() == pytest.approx([-(nll * weights).sum(), -nll.sum()], rel=1e-5)
    assert found.tokens.tolist() == pytest.approx([weights.sum(), len(nll)])
    assert step("sft", *adapted, [weighted])[0] == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-5)


# -- held-out rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_held_out_loss_is_that_of_a_step_without_smoothing(adapted, name):
    decoder, parameters = adapted
    loss, numbers, _, _ = step(name, decoder, parameters, rows_for(name))
    smoothed = config(name, label_smoothing=0.2)
    found, also = held_out(OBJECTIVES[name], decoder, rows_for(name), smoothed, 60)
    assert found == pytest.approx(loss, rel=1e-5)
    assert also == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    if name == "sft":
        assert abs(step(name, decoder, parameters, rows_for(name), label_smoothing=0.2)[0] - loss) > 1e-3


# -- ORPO and KTO apart -------------------------------------------------------------------------------------------


def test_orpo_without_the_odds_is_sft_on_the_chosen_answers(adapted):
    decoder, parameters = adapted
    wanted, _, gradients, _ = step("sft", decoder, parameters, rows_for("sft"))
    objective = OBJECTIVES["orpo"]
    batches = objective.pack(rows_for("orpo"), 60)
    settings = Settings(beta=0.0, step_mean=objective.step_mean(decoder, batches).value)
    loss = sum(objective.loss(decoder, batch, settings).loss for batch in batches) / 5
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    assert_same_gradients(torch.autograd.grad(loss, parameters), gradients)


def test_an_answer_that_is_certain_has_finite_odds_and_gradients():
    mean_log_p = torch.tensor([0.0, -1.0, -1.0, 0.0, 0.0, 0.0, -200.0, -1e-30], requires_grad=True)
    odds = log_odds_ratios(mean_log_p)
    odds.sum().backward()
    assert bool(odds.isfinite().all())
    assert bool(mean_log_p.grad.isfinite().all())
    assert float(odds[0].detach()) > 10
    assert float(odds[2].detach()) == 0.0


@pytest.mark.parametrize(("step_mean", "kl"), [(-1.0, 0.0), (0.5, 0.5), (math.nan, math.nan)])
def test_kto_takes_no_kl_below_0_and_hides_none_that_is_no_number(adapted, step_mean, kl):
    """Else a step whose estimate broke would be learned from as if there were none to subtract."""
    objective, decoder = OBJECTIVES["kto"], adapted[0]
    (batch,) = objective.pack(rows_for("kto", texts(3)), 500)
    scored = objective.loss(decoder, batch, Settings(beta=0.1, step_mean=step_mean))
    assert scored.numbers["kl"].value == pytest.approx(kl, nan_ok=True)
    assert math.isnan(float(scored.loss.detach())) == math.isnan(kl)


def test_kto_gives_each_prompt_the_answer_of_the_row_before_it():
    given = [([1, 1], [11, 12]), ([2, 2, 2], [21]), ([3], [31, 32, 33, 34, 35])]
    rows = [Labelled(example(*parts), True) for parts in given]
    (batch,) = OBJECTIVES["kto"].pack(rows, 100)
    made = [
        (part.input_ids[first:last].tolist(), part.labels[first:last].tolist())
        for part in batch.mismatched
        for first, last in zip(part.segment_starts[:-1], part.segment_starts[1:], strict=True)
    ]
    expected = [[1, 1, 31, 32, 33, 34], [2, 2, 2, 11, 12], [3, 21]]  # no longer than the longest row, which has 6
    assert sorted(ids for ids, _ in made) == sorted(expected)
    learned = {tuple(ids): [label for label in labels if label >= 0] for ids, labels in made}
    assert learned == {(1, 1, 31, 32, 33, 34): [31, 32, 33, 34], (2, 2, 2, 11, 12): [11, 12], (3, 21): [21]}


def test_an_answer_keeps_its_weights_under_another_prompt():
    weights = np.array([0, 0, 0.5, 2], np.float32)
    weighted = Example(np.array([1, 1, 11, 12]), weights > 0, weights=weights)
    (batch,) = OBJECTIVES["kto"].pack([Labelled(weighted, True), Labelled(example([2], [21]), False)], 100)
    (part,) = batch.mismatched
    counts = dict(zip(part.labels.tolist(), part.weights.tolist(), strict=True))
    assert {label: counts[label] for label in (11, 12, 21)} == {11: 0.5, 12: 2.0, 21: 1.0}


def test_kto_knows_which_answers_are_to_be_given():
    rows = rows_for("kto", texts(9))
    for batch in OBJECTIVES["kto"].pack(rows, 50):
        borders = zip(batch.segment_starts[:-1], batch.segment_starts[1:], strict=True)
        for (first, last), desirable in zip(borders, batch.desirable, strict=True):
            whole = batch.input_ids[: batch.prefix].tolist() + batch.input_ids[first:last].tolist()
            (row,) = [row for row in rows if row.example.input_ids.tolist() == whole]
            assert row.desirable == desirable


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_takes_rows_of_one_kind(adapted, desirable):
    rows = [Labelled(row.example, desirable) for row in rows_for("kto")]
    loss, numbers, _, _ = step("kto", *adapted, rows)
    assert 0 < loss < 1
    kind = "chosen" if desirable else "rejected"
    assert set(numbers) == {"kl", f"rewards/{kind}", f"logps/{kind}"}


# -- which rows share a micro-batch -------------------------------------------------------------------------------


def pair_of(prompt, chosen, rejected, seed=0):
    draw = np.random.default_rng(seed)
    ids_of = ids(draw, prompt)
    return example(ids_of, ids(draw, chosen)), example(ids_of, ids(draw, rejected))


def test_a_pair_alone_computes_its_prompt_once():
    chosen, rejected = pair_of(200, 7, 9)
    (batch,) = OBJECTIVES["dpo"].pack([Pair(chosen, rejected)], 4096)
    assert batch.prefix == 199  # the last token of the prompt predicts the first of each answer
    assert len(batch.input_ids) == 199 + (1 + 7) + (1 + 9)


@pytest.mark.parametrize(("prompt", "n_batches"), [(BATCH_COST, 4), (BATCH_COST // 2 - 4, 1)])
def test_pairs_are_packed_unless_sharing_their_prompts_saves_more(prompt, n_batches):
    pairs = [pair_of(prompt, 10, 10, seed) for seed in range(4)]
    assert len(fit(pairs, 4096)) == n_batches


def test_pairs_of_one_prompt_share_it():
    prompt = ids(np.random.default_rng(9), 100)
    pairs = [Pair(example(prompt, [i, 11]), example(prompt, [i, 12])) for i in range(3, 7)]
    (batch,) = OBJECTIVES["dpo"].pack(pairs, 200)
    assert batch.prefix == 99
    assert len(batch.input_ids) == 99 + 8 * 3


@pytest.mark.parametrize(("budget", "n_batches"), [(99 + 4 * 3, 1), (99 + 4 * 3 - 1, 2)])
def test_a_micro_batch_is_counted_as_it_is_packed(budget, n_batches):
    prompt = ids(np.random.default_rng(9), 100)
    pairs = [Pair(example(prompt, [i, 11]), example(prompt, [i, 12])) for i in (3, 4)]
    batches = OBJECTIVES["dpo"].pack(pairs, budget)
    assert len(batches) == n_batches
    assert max(len(batch.input_ids) for batch in batches) == (budget if n_batches == 1 else 99 + 2 * 3)


sizes = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(8, 200))
def test_pairs_keep_the_budget_and_stay_whole(given_sizes, budget):
    pairs = [Pair(*pair_of(*size, seed)) for seed, size in enumerate(given_sizes)]
    numbers = fit([(pair.chosen, pair.rejected) for pair in pairs], budget)
    assert sorted(i for members in numbers for i in members) == list(range(len(pairs)))
    batches = OBJECTIVES["dpo"].pack(pairs, budget)
    assert sum(map(OBJECTIVES["dpo"].units, batches)) == len(pairs)
    for members, batch in zip(numbers, batches, strict=True):
        assert len(batch.input_ids) <= budget or len(members) == 1
        whole = [
            batch.input_ids[: batch.prefix].tolist() + batch.input_ids[first:last].tolist()
            for first, last in zip(batch.segment_starts[:-1], batch.segment_starts[1:], strict=True)
        ]
        assert whole == [e.input_ids.tolist() for i in members for e in (pairs[i].chosen, pairs[i].rejected)]


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_has_what_a_config_can_ask_for(name):
    assert OBJECTIVES[name].name == name
    assert objective_of(config(name)) is OBJECTIVES[name]
    assert OBJECTIVES[name].paper.startswith("arXiv:")


def test_every_objective_of_a_config_is_in_the_table():
    assert set(get_args(TrainConfig.model_fields["objective"].annotation)) == set(OBJECTIVES)


def test_label_smoothing_is_for_cross_entropy():
    assert objective_of(config("sft", label_smoothing=0.1)).name == "sft"
    with pytest.raises(ConfigError) as e:
        objective_of(config("dpo", label_smoothing=0.1))
    assert str(e.value).splitlines() == [
        "--label-smoothing with the objective dpo",
        "  why: it compares the probabilities of answers; smoothed ones are none",
        "  fix: leave --label-smoothing out, or train with --objective sft",
    ]


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_weights_of_answers_are_for_rated_ones(name):
    assert objective_of(config("kto", **{name: 2.0})).name == "kto"
    with pytest.raises(ConfigError) as e:
        objective_of(config("dpo", **{name: 2.0}))
    assert str(e.value).splitlines() == [
        "--desirable-weight or --undesirable-weight with the objective dpo",
        "  why: they weigh rated answers against each other; here there are none",
        "  fix: leave them out, or train with --objective kto",
    ]


def test_kto_needs_another_row():
    with pytest.raises(DataError) as e:
        OBJECTIVES["kto"].pack(rows_for("kto")[:1], 100)
    assert str(e.value).splitlines() == [
        "one row is too few for the objective kto",
        "  why: its KL term is estimated from prompts with the answers of other rows",
        "  fix: give it two rows or more",
    ]
    with pytest.raises(ConfigError):
        objective_of(config("kto", batch_rows=1))
