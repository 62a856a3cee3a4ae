"""The loop: what a step learns, when it measures, keeps and stops, and what stays out of its measurements."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import Objective, Schedule, TrainConfig
from edgelora.data.encode import Example
from edgelora.data.order import Order
from edgelora.data.preference import Labelled, Pair
from edgelora.errors import EdgeloraError
from edgelora.peft.adapter import read_adapter
from edgelora.peft.inject import collect, inject
from edgelora.progress import Sample
from edgelora.training import loop, neftune
from edgelora.training.checkpoint import checkpoint_path, read_checkpoint
from edgelora.training.job import Job, measurements
from edgelora.training.loop import MAX_BAD_STEPS, train
from edgelora.training.measure import averaged, over_held_out
from edgelora.training.metrics import read_metrics
from edgelora.training.objectives import objective_of
from edgelora.training.run import run_training
from edgelora.training.state import State


class Watch:
    """Hears everything, and asks for a stop behind a step."""

    def __init__(self, state, stop=None):
        self.state, self.stop, self.events, self.saved = state, stop, [], []
        self.weights, self.rates = [], []  # after each step; of the optimizer's groups in it

    def stepped(self, progress, _tokens, _seconds):
        self.events.append(progress)
        if progress.loss is not None:
            self.weights.append({name: p.detach().clone() for name, p in self.state.parameters.items()})
            self.rates.append({group["lr"] for group in self.state.optimizer.param_groups})

    def save(self, state):
        self.saved.append(state.step)

    def asked_to_stop(self):
        return self.state.step == self.stop

    def peak_bytes(self):
        return None


def examples(*lengths, seed=0):
    """Random ids, the second half of each learned."""
    draw = np.random.default_rng(seed)
    return [Example(draw.integers(3, 512, n), np.arange(n) >= n // 2) for n in lengths]


@pytest.fixture
def make(tiny):
    """`make(rows, held_out=…, sampler=…, stop=…, **settings)`: a job of one row a step, its state and who watches."""

    def ready(rows, held_out=(), sampler=None, stop=None, **settings):
        defaults = {"rank": 4, "alpha": 8, "learning_rate": 5e-3, "batch_rows": 1, "epochs": 1, "warmup_steps": 0,
                    "micro_batch_tokens": 768, "dtype": "f32"}  # fmt: skip
        config = TrainConfig(**{"base": tiny.path, "data": "-", "out": "-"} | defaults | settings)
        decoder = build_decoder(open_base(tiny.path))
        inject(decoder, config.method, config.rank, config.alpha, config.seed)
        state = State(decoder.named_parameters(), config)
        order = Order([len(rows)], config.batch_rows, config.seed)
        job = Job(decoder, objective_of(config), rows, order, config, held_out, sampler)
        return SimpleNamespace(job=job, state=state, watch=Watch(state, stop), decoder=decoder)

    return ready


def trained(run):
    run.ended = train(run.job, run.state, run.watch)
    return run


def losses(run):
    return [e.loss for e in run.watch.events if e.loss is not None]


def held_out_losses(run):
    return {e.step: e.held_out_loss for e in run.watch.events if e.held_out_loss is not None}


# -- what a step learns -------------------------------------------------------------------------------------------


def test_the_loss_of_a_step_is_transformers_mean_over_all_its_learned_tokens(make, tiny, transformers_model):
    rows, model = examples(30, 12, 5, 3), transformers_model(tiny)
    nll, n_tokens = 0.0, 0
    for row in rows:
        ids, learned = torch.from_numpy(row.input_ids), torch.from_numpy(row.loss_mask[1:])
        logits = model(ids[None]).logits[0, :-1].detach()
        nll += float(F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
        n_tokens += int(learned.sum())
    run = trained(make(rows, batch_rows=4, micro_batch_tokens=16))
    assert losses(run) == pytest.approx([nll / n_tokens], rel=1e-5)


def test_each_learned_token_of_a_step_weighs_the_same(make):
    """One step over micro-batches of unequal size gives the gradient, so the weights, of one packed row."""
    parts, whole = (trained(make(examples(30, 12, 5, 3), batch_rows=4, micro_batch_tokens=n)) for n in (16, 768))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, value in parts.watch.weights[0].items():
        torch.testing.assert_close(value, whole.watch.weights[0][name], atol=1e-4, rtol=0, msg=name)


# the shares of four steps, two of which warm up: up by halves, then down to 0 at step 4 by each one's own rule
SHARES = {
    "linear": [0.5, 1, 1, 0.5],
    "cosine": [0.5, 1, 1, 0.5],  # (1 + cos(π/2)) / 2 in the middle of the fall
    "constant": [0.5, 1, 1, 1],
    "wsd": [0.5, 1, 1, 1 - math.sqrt(0.5)],  # falls over half of the four, by 1 − √
}


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_reaches_the_optimizer(make, schedule):
    run = trained(make(examples(*[8] * 4), schedule=schedule, warmup_steps=2, decay_share=0.5, learning_rate=0.001))
    wanted = [0.001 * share for share in SHARES[schedule]]
    assert [e.learning_rate for e in run.watch.events] == pytest.approx(wanted)
    assert [rate for (rate,) in run.watch.rates] == pytest.approx(wanted)


def test_warmup_takes_at_most_half_of_a_short_run(make):
    run = trained(make(examples(*[8] * 4), warmup_steps=100, learning_rate=0.001))
    assert [e.learning_rate for e in run.watch.events] == pytest.approx([0.0005, 0.001, 0.001, 0.0005])


@pytest.mark.parametrize("most", [0.01, 0.5, 1e9])
def test_the_optimizer_sees_no_longer_gradient_than_was_asked(make, most):
    """AdamW's mean gradient behind its first step is a tenth of what it saw."""
    run = trained(make(examples(8), max_grad_norm=most))
    means = [state["exp_avg"] for state in run.state.optimizer.state.values()]
    seen = 10 * float(torch.stack([mean.norm() for mean in means]).norm())
    norm = run.watch.events[0].grad_norm
    assert 0.5 < norm < 1e9
    assert seen == pytest.approx(min(norm, most), rel=1e-4)


def test_loraplus_lets_b_learn_faster(make):
    run = trained(make(examples(8), method="loraplus", loraplus_ratio=16, learning_rate=1e-4))
    assert sorted(run.watch.rates[0]) == pytest.approx([1e-4, 16e-4])


def test_max_steps_ends_a_run_early(make):
    run = trained(make(examples(*[8] * 6), max_steps=2))
    assert (run.ended, len(losses(run)), run.watch.events[-1].total) == (True, 2, 2)


# -- measuring ----------------------------------------------------------------------------------------------------


def test_the_held_out_loss_is_measured_before_now_and_then_and_at_the_end(make):
    run = trained(make(examples(*[8] * 7), held_out=examples(9, 12, seed=1), eval_every=3))
    assert list(held_out_losses(run)) == [0, 3, 6, 7]
    assert run.watch.events[0].best is None  # of the base: it is no candidate


@pytest.mark.parametrize(("n_steps", "every"), [(1, 1), (10, 1), (11, 2), (95, 10)])
def test_ten_measurements_are_made_where_nobody_says(make, n_steps, every):
    assert make(examples(*[4] * n_steps)).job.eval_every == every


@pytest.mark.parametrize(("n_steps", "every"), [(1, None), (7, 3), (6, 3), (4, 4), (3, 4), (11, None)])
def test_as_many_measurements_are_made_as_are_reckoned_with(make, n_steps, every):
    run = trained(make(examples(*[4] * n_steps), held_out=examples(6, seed=1), eval_every=every))
    assert len(held_out_losses(run)) == measurements(run.job.config, run.job.total)
    made = [e.step for e in run.watch.events if e.held_out_loss is not None]
    for step in range(run.job.total + 1):  # the time left counts those that are to come
        assert run.job.measurements_left(step) == sum(later > step for later in made)


def test_no_held_out_rows_no_measurement(make):
    run = trained(make(examples(8, 8)))
    assert [e.step for e in run.watch.events] == [1, 2]
    assert held_out_losses(run) == {}


def test_best_is_said_of_each_loss_that_none_was_below(make):
    run = trained(make(examples(*[12] * 8), held_out=examples(12, seed=9), eval_every=1, learning_rate=0.05))
    base, *steps = run.watch.events
    lowest, found = base.held_out_loss, []
    for event in steps:
        assert event.best == (event.held_out_loss < lowest)
        lowest = min(lowest, event.held_out_loss)
        found.append(event.best)
    assert set(found) == {True, False}  # the case was worth looking at
    best = min(steps, key=lambda event: event.held_out_loss)
    assert (run.state.best.step, run.state.best.loss) == (best.step, best.held_out_loss)
    assert run.state.base_loss == base.held_out_loss


def test_no_step_of_a_run_that_spoils_the_base_is_the_best(make):
    """Yet the lowest of them is remembered, for who stops there."""
    run = trained(make(examples(*[12] * 3), held_out=examples(12, seed=9), eval_every=1, learning_rate=0.9))
    base, *steps = run.watch.events
    assert all(event.held_out_loss > base.held_out_loss for event in steps)
    assert [event.best for event in steps] == [False] * 3
    assert run.state.best.loss == min(event.held_out_loss for event in steps)


def test_a_run_without_patience_goes_to_its_end_and_one_with_it_does_not(make):
    settings = {"held_out": examples(12, seed=9), "eval_every": 1, "learning_rate": 0.05}
    whole = trained(make(examples(*[12] * 12), **settings))
    impatient = trained(make(examples(*[12] * 12), patience=2, **settings))
    assert (whole.ended, impatient.ended) == (True, True)
    assert whole.state.step == 12
    assert impatient.state.step == impatient.state.best.step + 2 < 12
    assert losses(impatient) == losses(whole)[: impatient.state.step]  # until then they are one run
    assert {impatient.state.best.step, impatient.state.step} <= set(impatient.watch.saved)


def test_a_run_that_lost_its_patience_does_not_go_on(make):
    settings = {"held_out": examples(12, seed=9), "eval_every": 1, "learning_rate": 0.05, "patience": 1}
    run = trained(make(examples(*[12] * 12), **settings))
    ended_at = run.state.step
    trained(run)  # as after --resume
    assert run.state.step == ended_at < 12


def test_samples_are_answered_at_each_measurement(make):
    asked = []

    def sampler(decoder):
        asked.append(decoder)
        return (Sample("Hi", f"answer {len(asked)}"),)

    run = trained(make(examples(*[8] * 4), sampler=sampler, eval_every=2))
    assert {e.step: e.samples[0].text for e in run.watch.events if e.samples} == {
        0: "answer 1", 2: "answer 2", 4: "answer 3",
    }  # fmt: skip
    assert asked == [run.decoder] * 3


# -- keeping and stopping -----------------------------------------------------------------------------------------


def test_checkpoints_are_kept_where_one_says_at_measurements_and_at_the_end(make):
    rows, held = examples(*[4] * 7), examples(6, seed=1)
    assert trained(make(rows, save_every=3)).watch.saved == [3, 6, 7]
    assert trained(make(rows, save_every=3, held_out=held, eval_every=2)).watch.saved == [2, 3, 4, 6, 7]
    assert trained(make(rows)).watch.saved == [7]


def test_where_nobody_says_a_checkpoint_is_kept_every_hundred_steps(make, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_STEPS", 3)
    assert trained(make(examples(*[4] * 7))).watch.saved == [3, 6, 7]


def test_a_stop_ends_the_step_and_saves(make):
    run = trained(make(examples(*[8] * 5), stop=2))
    assert (run.ended, run.state.step, run.watch.saved) == (False, 2, [2])
    run.watch.stop = None
    whole = trained(make(examples(*[8] * 5)))
    assert [loss.hex() for loss in losses(trained(run))] == [loss.hex() for loss in losses(whole)]


def test_a_stop_behind_the_last_step_is_no_stop(make):
    assert trained(make(examples(8, 8), stop=2)).ended


# -- a moving average ---------------------------------------------------------------------------------------------


def test_what_is_measured_and_kept_is_the_moving_average(make):
    held = examples(12, 9, seed=1)
    run = trained(make(examples(*[12] * 4), held_out=held, eval_every=4, ema_decay=0.5))
    shares = np.array([1, 2, 4, 8]) / 15  # the newest weighs most: dᵗ⁻ⁱ, normed
    live = run.watch.weights
    average = {name: sum(s * w[name] for s, w in zip(shares, live, strict=True)) for name in live[0]}
    with averaged(run.state):
        for name, value in run.state.parameters.items():
            torch.testing.assert_close(value.detach(), average[name].float(), atol=1e-6, rtol=1e-5)
    for name, value in run.state.parameters.items():
        assert torch.equal(value, live[-1][name])  # training goes on from these
    plain = trained(make(examples(*[12] * 4), held_out=held, eval_every=4))
    assert losses(plain) == losses(run)  # it watches, and changes no step
    assert held_out_losses(plain)[0] == held_out_losses(run)[0]
    assert held_out_losses(plain)[4] != held_out_losses(run)[4]
    with torch.no_grad():
        for name, value in plain.state.parameters.items():
            value.copy_(average[name])
    assert over_held_out(plain.job, plain.state)[0] == pytest.approx(held_out_losses(run)[4], rel=1e-5)


# -- noise --------------------------------------------------------------------------------------------------------


def pair(seed):
    chosen, rejected = examples(10, 12, seed=seed)
    prompt = np.arange(5, 9)
    return Pair(
        *(Example(np.concatenate([prompt, e.input_ids]), np.arange(len(e) + 4) >= 4) for e in (chosen, rejected))
    )


def rows_of(objective, n=4):
    """What the objective learns from; KTO's answers are good and bad in turn."""
    if objective == "sft":
        return [pair(i).chosen for i in range(n)]
    if objective == "kto":
        return [Labelled(pair(i).chosen, i % 2 == 0) for i in range(n)]
    return [pair(i) for i in range(n)]


@pytest.mark.parametrize("objective", get_args(Objective))
def test_noise_is_where_something_is_learned_and_nowhere_else(make, monkeypatch, objective):
    """Not in evaluation, not under the frozen reference, and not in a number that is never differentiated."""
    drawn, real = [], neftune.torch.empty
    held = rows_of(objective, 2)
    settings = {"objective": objective, "batch_rows": 4, "held_out": held, "eval_every": 1, "learning_rate": 1e-5}
    noisy = make(rows_of(objective), neftune_alpha=50.0, **settings)

    def seen(*shape, **options):
        assert torch.is_grad_enabled()
        assert all(linear.delta is not None for linear in noisy.decoder.linears.values())
        drawn.append(shape)
        return real(*shape, **options)

    # its own torch alone: layers too make room with `empty`
    own = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("is_grad_enabled", "tensor", "float32")}, empty=seen
    )
    monkeypatch.setattr(neftune, "torch", own)
    trained(noisy)
    monkeypatch.undo()
    plain = trained(make(rows_of(objective), **settings))
    assert drawn
    assert noisy.decoder.noise is None
    assert losses(noisy)[0] != pytest.approx(losses(plain)[0], rel=1e-4)
    assert held_out_losses(noisy)[0] == held_out_losses(plain)[0]


@pytest.mark.parametrize("alpha", [2.0, 9.0])
def test_noise_is_as_strong_as_was_asked(make, monkeypatch, alpha):
    """Within ±α/√(L·d), and of that many numbers one comes near."""
    largest, real = [], loop.neftune

    def seen(x, *asked, **options):
        noisy = real(x, *asked, **options)
        largest.append(float((noisy - x).abs().max()))
        return noisy

    monkeypatch.setattr(loop, "neftune", seen)
    trained(make(examples(40, 40), neftune_alpha=alpha))
    assert largest == pytest.approx([alpha / math.sqrt(40 * 256)] * 2, rel=1e-2)


def test_labels_are_smoothed_while_learning_only(make):
    held = examples(12, seed=1)
    smooth, plain = (
        trained(make(examples(12), held_out=held, label_smoothing=s, learning_rate=1e-5)) for s in (0.3, 0.0)
    )
    assert losses(smooth) != losses(plain)
    assert held_out_losses(smooth)[0] == held_out_losses(plain)[0]


class NoFloat64(TorchDispatchMode):
    """In here nothing on a device makes a tensor of 64-bit floats, which MPS does not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [part for part in tree_leaves(out) if isinstance(part, torch.Tensor)]
        assert all(part.dtype != torch.float64 for part in made), func
        return out


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [*((name, "adamw") for name in get_args(Objective)), ("sft", "lion"), ("sft", "adafactor")],
)
def test_a_step_needs_no_float64(make, objective, optimizer):
    run = make(
        rows_of(objective), held_out=rows_of(objective, 2), objective=objective, optimizer=optimizer, batch_rows=4,
        neftune_alpha=5.0, ema_decay=0.9,
    )  # fmt: skip
    with NoFloat64():
        trained(run)
    assert losses(run)


# -- numbers that are not finite ----------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """`broken(steps, change)`: what the micro-batches of these steps (from 0) came to goes through `change`."""

    def breaks(steps, change):
        count, real = iter(range(1000)), loop.mean_losses

        def changed(*args, **options):
            is_broken = next(count) in steps
            return (change(s) if is_broken else s for s in real(*args, **options))

        monkeypatch.setattr(loop, "mean_losses", changed)

    return breaks


def plus(value):
    return lambda scored: scored._replace(loss=scored.loss + value)


def no_gradient(scored):
    """A finite loss whose gradient is not."""
    loss = scored.loss * 1.0
    loss.register_hook(lambda gradient: gradient * math.nan)
    return scored._replace(loss=loss)


@pytest.mark.parametrize("change", [plus(math.nan), plus(math.inf), no_gradient], ids=["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(make, broken, change):
    broken({0}, change)
    run = trained(make(examples(12), ema_decay=0.9))
    assert (run.state.skipped, run.state.in_a_row) == (1, 1)
    assert run.watch.events[-1].skipped_steps == 1
    assert not any(parts["lora_B"].any() for parts in collect(run.decoder).values())  # B starts at zero
    assert run.state.ema.steps == 0


def test_training_goes_on_after_bad_steps(make, broken):
    broken({1, 2, 4}, plus(math.nan))
    run = trained(make(examples(*[12] * 6)))
    assert run.state.skipped == 3
    assert np.flatnonzero(np.isnan(losses(run))).tolist() == [1, 2, 4]
    assert all(e.smoothed_loss is not None and math.isfinite(e.smoothed_loss) for e in run.watch.events)
    tensors = collect(run.decoder).values()
    assert all(np.isfinite(value).all() for parts in tensors for value in parts.values())
    assert any(parts["lora_B"].any() for parts in tensors)


def test_three_bad_steps_in_a_row_stop_the_run_with_the_last_good_state_kept(make, broken):
    broken({1, 2, 3}, plus(math.nan))
    run = make(examples(*[12] * 6))
    with pytest.raises(EdgeloraError) as e:
        train(run.job, run.state, run.watch)
    assert str(e.value).splitlines() == [
        f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row (step 4)",
        "  why: the learning rate is too high for this model, or the base holds broken weights",
        "  fix: try --learning-rate 0.001 --overwrite",  # a fifth of 5e-3
    ]
    assert run.watch.saved == [4]
    assert all(torch.equal(value, run.watch.weights[0][name]) for name, value in run.state.parameters.items())


def test_a_held_out_loss_that_is_not_finite_is_not_the_best(make):
    run = make(examples(8, 8), held_out=examples(8, seed=1), eval_every=1, learning_rate=1e-9)
    real = run.job.objective

    def loss(*arguments):
        scored = real.loss(*arguments)
        return scored if torch.is_grad_enabled() else plus(math.nan)(scored)

    broken = SimpleNamespace(
        pack=real.pack, units=real.units, step_mean=real.step_mean, shows=real.shows, loss=loss
    )  # fmt: skip
    run.job = replace(run.job, objective=broken)
    trained(run)
    assert run.state.best is None
    assert [e.best for e in run.watch.events] == [None, False, False]


# -- the whole way, with each objective ---------------------------------------------------------------------------

# what an adapter that does nothing comes to: log 2, (1/2β)² at β = 0.1, and ½
AT_THE_START = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}
WORDS = ["red", "green", "blue", "white", "warm", "cold", "dim", "bright"]


def preferences(objective):
    for number, word in enumerate(WORDS):
        prompt, good, bad = f"Make it {word}", f"the light is {word} now", "no"
        if objective == "kto":
            yield {"prompt": prompt, "completion": bad if number % 2 else good, "label": number % 2 == 0}
        else:
            yield {"prompt": prompt, "chosen": good, "rejected": bad}


@pytest.mark.parametrize("objective", [name for name in get_args(Objective) if name != "sft"])
def test_preferences_are_learned_from_file_to_adapter(tiny, tmp_path, objective):
    rows = [json.dumps(row) for row in preferences(objective)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text("\n".join(rows[:2]) + "\n", encoding="utf-8")
    config = TrainConfig(
        base=tiny.path, data=tmp_path / "train.jsonl", valid=tmp_path / "valid.jsonl", out=tmp_path / "mine", rank=4,
        objective=objective, learning_rate=5e-3, warmup_steps=0, batch_rows=8, epochs=6, dtype="f32",
    )  # fmt: skip
    run = run_training(config)
    before = read_metrics(run.folder / "metrics.jsonl")[0].held_out_loss
    if objective in AT_THE_START:
        assert run.losses[0] == pytest.approx(AT_THE_START[objective], rel=1e-5)
        assert before == pytest.approx(AT_THE_START[objective], rel=1e-5)
    assert run.losses[-1] < 0.9 * run.losses[0]
    assert run.held_out_loss < 0.9 * before
    first, *_, last = read_metrics(run.folder / "metrics.jsonl")
    assert last.numbers.keys() <= last.held_out_numbers.keys() | {"kl"}
    for numbers in (last.numbers, last.held_out_numbers):  # the answers to give have come to be preferred
        assert numbers["rewards/margins"] > 0
        assert numbers.get("rewards/accuracies", 1) == 1
    if objective in AT_THE_START:
        assert first.held_out_numbers["rewards/margins"] == 0
    base = open_base(tiny.path)
    adapter = read_adapter(run.out, base.layers)
    assert adapter.contract.training["objective"] == objective


def test_with_patience_the_adapter_is_that_of_the_best_step(tiny, tmp_path):
    rows = [
        json.dumps({"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]}) for w in WORDS
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:6]) + "\n", encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text("\n".join(rows[6:]) + "\n", encoding="utf-8")
    config = TrainConfig(
        base=tiny.path, data=tmp_path / "train.jsonl", valid=tmp_path / "valid.jsonl", out=tmp_path / "mine", rank=4,
        learning_rate=0.05, warmup_steps=0, batch_rows=2, epochs=8, eval_every=1, patience=3, ema_decay=0.3,
        samples=["red"], dtype="f32",
    )  # fmt: skip
    run = run_training(config)
    lines = read_metrics(run.folder / "metrics.jsonl")[1:]
    best = min(lines, key=lambda line: line.held_out_loss)
    assert run.step == best.step < lines[-1].step == run.n_steps == best.step + 3
    assert run.held_out_loss == best.held_out_loss
    assert all(line.samples[0].prompt == "red" for line in lines)
    kept = read_checkpoint(checkpoint_path(run.folder / "checkpoints", best.step)).tensors
    base = open_base(tiny.path)
    adapter = read_adapter(run.out, base.layers)
    for module, parts in adapter.tensors.items():
        for part, value in parts.items():
            (name,) = [n for n in kept if n.startswith("ema.") and f"{module}." in n and n.endswith(part)]
            np.testing.assert_array_equal(value, kept[name].numpy())
    assert adapter.contract.training["adapter_of_step"] == best.step
