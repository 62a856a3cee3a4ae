"""A training run on a tiny Q8_0 model: it learns, repeats under a seed, and leaves one whole folder or nothing."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from pydantic import ValidationError
from torch.nn import functional as F

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.data.conversation import read_conversations
from edgelora.data.encode import Example, encode_all
from edgelora.errors import DataError, EdgeloraError, OutputError
from edgelora.files.contract import read_contract
from edgelora.peft.adapter import TENSORS, read_adapter
from edgelora.peft.inject import attach, collect, inject
from edgelora.training import loop
from edgelora.training.loop import MAX_BAD_STEPS, held_out_loss, learning_rate_at, train
from edgelora.training.run import run_training

ROOT = Path(__file__).resolve().parent.parent
FILES = ["adapter_config.json", "adapter_model.safetensors", "edgelora.json"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(24 rows to learn, 8 rows held out) of the example commands."""
    rows = (ROOT / "examples" / "home" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    folder = tmp_path_factory.mktemp("data")
    for name, part in (("train.jsonl", rows[:24]), ("valid.jsonl", rows[24:32])):
        (folder / name).write_text("".join(part), encoding="utf-8")
    return folder / "train.jsonl", folder / "valid.jsonl"


@pytest.fixture(scope="module")
def settings(make_tiny, data):
    """`settings(out, **changes)`: a run of six steps over the Q8_0 model."""

    def make(out, **changes):
        base = make_tiny(Type.Q8_0).path
        defaults = {"rank": 4, "learning_rate": 5e-3, "warmup_steps": 2, "epochs": 2, "valid": data[1]}
        return TrainConfig(**{"base": base, "data": data[0], "out": out} | defaults | changes)

    return make


@pytest.fixture(scope="module")
def ran(settings, tmp_path_factory):
    """(run, events, config) of one whole run."""
    config, events = settings(tmp_path_factory.mktemp("run") / "adapter"), []
    return run_training(config, events.append), events, config


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what a run learns --------------------------------------------------------------------------------------------


def test_the_loss_falls(ran):
    losses = ran[0].result.losses
    assert len(losses) == 6  # 24 rows * 2 epochs / 8 rows a step
    assert losses[0] > math.log(512) * 0.9  # a random model knows nothing of its 512 tokens
    assert np.mean(losses[-2:]) < losses[0] - 0.5


def test_the_held_out_loss_is_that_of_the_saved_adapter(ran, data):
    run, _, config = ran
    base = open_base(config.base)
    examples = encode_all(read_conversations(data[1]), base.tokenizer, base.template, 1024)
    decoder = build_decoder(base)
    before = held_out_loss(decoder, examples, 768)
    attach(decoder, read_adapter(run.out, base.linears))
    assert held_out_loss(decoder, examples, 768) == pytest.approx(run.result.held_out_loss, rel=1e-4)
    assert run.result.held_out_loss < before


@pytest.mark.parametrize("max_tokens", [64, 768])
def test_held_out_loss_is_that_of_transformers(tiny, data, transformers_model, max_tokens):
    base = open_base(tiny.path)
    examples = encode_all(read_conversations(data[1]), base.tokenizer, base.template, 1024)
    model, nll, n_tokens = transformers_model(tiny), 0.0, 0
    for e in examples:
        ids = torch.from_numpy(e.input_ids)
        learned = torch.from_numpy(e.loss_mask[1:])
        logits = model(ids[None]).logits[0, :-1].detach()
        nll += float(F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
        n_tokens += int(learned.sum())
    assert held_out_loss(build_decoder(base), examples, max_tokens) == pytest.approx(nll / n_tokens, rel=1e-5)


def test_each_learned_token_of_a_step_weighs_the_same(tiny, settings):
    """One step over micro-batches of unequal size gives the gradient, so the weights, of one packed row."""
    draw = np.random.default_rng(0)
    examples = [Example(draw.integers(3, 512, n), np.arange(n) > n // 2) for n in (30, 12, 5, 3)]
    results = []
    for budget in (16, 768):
        decoder = build_decoder(open_base(tiny.path))
        config = settings("-", batch_rows=4, epochs=1, micro_batch_tokens=budget)
        result = train(decoder, inject(decoder, "lora", 4, 8, 0), examples, [], config)
        results.append((result.losses, collect(decoder)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, parts in results[0][1].items():
        for part, value in parts.items():
            np.testing.assert_allclose(value, results[1][1][name][part], atol=1e-4, err_msg=f"{name}.{part}")


# -- determinism --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(ran, settings, tmp_path):
    again = run_training(settings(tmp_path / "again", valid=None))
    assert digest(again.out / TENSORS) == digest(ran[0].out / TENSORS)
    assert again.result.losses == ran[0].result.losses


def test_another_seed_gives_another_adapter(ran, settings, tmp_path):
    other = run_training(settings(tmp_path / "other", valid=None, seed=1))
    assert digest(other.out / TENSORS) != digest(ran[0].out / TENSORS)


# -- what a run leaves --------------------------------------------------------------------------------------------


def test_the_folder_holds_three_files_and_nothing_is_beside_it(ran):
    out = ran[0].out
    assert sorted(f.name for f in out.iterdir()) == FILES
    assert [f.name for f in out.parent.iterdir()] == ["adapter"]


def test_the_contract_says_what_was_trained_on_what(ran, data):
    run, _, config = ran
    base = open_base(config.base)
    contract = read_contract((run.out / "edgelora.json").read_text(), "edgelora.json")
    assert contract.base == base.fingerprint
    assert contract.base_file.quant == "Q8_0"
    assert contract.base_file.sha256 == digest(config.base)
    assert contract.eog_ids == (0, 2)  # <|endoftext|>, <|im_end|>
    assert contract.tokenizer_sha256 == base.tokenizer.sha256
    assert contract.method == "lora"
    assert contract.training["data"] == {"name": "train.jsonl", "rows": 24, "sha256": digest(data[0])}
    assert (contract.training["steps"], contract.training["seed"], contract.training["rank"]) == (6, 0, 4)
    assert contract.evaluation["held_out_loss_torch"] == run.result.held_out_loss
    assert contract.evaluation["last_loss"] == run.result.losses[-1]
    assert {"edgelora", "torch"} <= contract.versions.keys()


def test_every_choice_has_its_reason(ran):
    contract = read_contract((ran[0].out / "edgelora.json").read_text(), "edgelora.json")
    choices = contract.training["choices"]
    assert choices.keys() == {"device", "dtype", "base_dtype"}
    assert all(choice["value"] and len(choice["why"]) > 10 for choice in choices.values())


def test_progress_counts_every_step(ran):
    events = ran[1]
    assert [(e.stage, e.step, e.total) for e in events] == [("train", i, 6) for i in range(1, 7)]
    assert [e.loss for e in events] == ran[0].result.losses
    shares = [0.5, 1, 1, 0.75, 0.5, 0.25]  # two steps up, four down
    assert [e.learning_rate for e in events] == pytest.approx([5e-3 * share for share in shares])
    assert events[-1].eta_s == 0
    assert all(e.tokens_per_s > 0 and e.peak_bytes > 0 for e in events)


# -- faults -------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_before_anything_is_read(settings, tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        run_training(settings(out, base=tmp_path / "none.gguf", data=tmp_path / "none.jsonl"))
    assert list(out.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(settings, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError):
        run_training(settings(tmp_path / "file" / "adapter"), lambda _: pytest.fail("trained for nothing"))


@pytest.mark.parametrize("name", ["alpha", "epochs", "learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_a_setting_that_is_no_finite_number_is_refused(settings, name, value):
    with pytest.raises(ValidationError, match=name):
        settings("-", **{name: value})


def test_overwrite_replaces_the_folder(settings, tmp_path):
    out = tmp_path / "adapter"
    first = run_training(settings(out, epochs=0.3, valid=None))
    (out / "note.txt").write_text("of the first run")
    before = digest(first.out / TENSORS)
    run_training(settings(out, epochs=0.3, valid=None, seed=1, overwrite=True))
    assert sorted(f.name for f in out.iterdir()) == FILES
    assert digest(out / TENSORS) != before
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


def test_a_row_that_is_too_long_leaves_nothing(settings, tmp_path):
    with pytest.raises(DataError, match="24 rows are longer than 8 tokens"):
        run_training(settings(tmp_path / "adapter", max_length=8))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_stopped_leaves_what_stood_there(settings, tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    (out / "keep.txt").write_text("mine")

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(settings(out, overwrite=True), stop)
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]
    assert (out / "keep.txt").read_text() == "mine"


def test_overwriting_never_deletes_what_is_no_adapter(settings, tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an adapter"):
        run_training(settings(out, overwrite=True))
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_run_whose_every_step_was_skipped_writes_nothing(settings, tmp_path, broken_steps):
    broken_steps({0}, float("nan"))
    with pytest.raises(EdgeloraError, match="in any step"):
        run_training(settings(tmp_path / "adapter", epochs=0.05))
    assert list(tmp_path.iterdir()) == []


# -- numbers that are not finite ----------------------------------------------------------------------------------


@pytest.fixture
def broken_steps(monkeypatch):
    """`broken_steps(numbers, value)`: the loss of these steps (from 0, one micro-batch each) has `value` added."""

    def breaks(numbers, value):
        count, real = iter(range(1000)), loop.batch_loss
        broken = lambda decoder, batch: real(decoder, batch) + (value if next(count) in numbers else 0)  # noqa: E731
        monkeypatch.setattr(loop, "batch_loss", broken)

    return breaks


def train_alone(tiny, settings, n_steps):
    decoder = build_decoder(open_base(tiny.path))
    draw = np.random.default_rng(0)
    examples = [Example(draw.integers(3, 512, 12), np.arange(12) > 0) for _ in range(n_steps)]
    config = settings("-", batch_rows=1, epochs=1)
    return train(decoder, inject(decoder, "lora", 4, 8, 0), examples, [], config), collect(decoder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(tiny, settings, broken_steps, value):
    broken_steps({0}, value)
    result, tensors = train_alone(tiny, settings, 1)
    assert result.skipped_steps == 1
    assert not any(parts["lora_B"].any() for parts in tensors.values())  # B starts at zero: nothing was learned


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny, settings, monkeypatch):
    real = loop.batch_loss

    def finite_loss_but_no_gradient(decoder, batch):
        loss = real(decoder, batch)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(loop, "batch_loss", finite_loss_but_no_gradient)
    result, tensors = train_alone(tiny, settings, 1)
    assert math.isfinite(result.losses[0])
    assert result.skipped_steps == 1
    assert not any(parts["lora_B"].any() for parts in tensors.values())


def test_training_goes_on_after_bad_steps(tiny, settings, broken_steps):
    broken_steps({1, 2, 4}, math.nan)
    result, tensors = train_alone(tiny, settings, 6)
    assert result.skipped_steps == 3
    assert np.flatnonzero(np.isnan(result.losses)).tolist() == [1, 2, 4]
    assert all(np.isfinite(value).all() for parts in tensors.values() for value in parts.values())
    assert any(parts["lora_B"].any() for parts in tensors.values())


def test_three_bad_steps_in_a_row_stop_the_run(tiny, settings, broken_steps):
    broken_steps({1, 2, 3}, math.nan)
    with pytest.raises(EdgeloraError) as e:
        train_alone(tiny, settings, 6)
    assert e.value.what == f"the loss was not a finite number in {MAX_BAD_STEPS} steps in a row (step 4)"
    assert "learning rate" in e.value.why
    assert e.value.fix == "try --learning-rate 0.001"  # a fifth of 5e-3


def test_a_run_whose_last_step_was_skipped_can_be_read_again(settings, broken_steps, tmp_path):
    broken_steps({1}, math.nan)
    out = tmp_path / "adapter"
    run = run_training(settings(out, epochs=2 / 3, valid=None, micro_batch_tokens=4096))  # two steps of eight rows
    assert run.result.skipped_steps == 1
    text = (out / "edgelora.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_contract(text, "edgelora.json").evaluation["last_loss"] is None


# -- the learning rate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 1 / 4), (3, 1), (4, 1), (5, 5 / 6), (9, 1 / 6), (10, 0)],  # up in 4, then down over the other 6 of 10
)
def test_learning_rate_goes_up_and_down(step, share):
    assert learning_rate_at(step, total=10, warmup=4) == pytest.approx(share)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate_at(0, total=1, warmup=0) == 1
    assert learning_rate_at(0, total=10, warmup=0) == 1


def test_warmup_takes_at_most_half_of_a_short_run(tiny, settings):
    rates = []
    decoder = build_decoder(open_base(tiny.path))
    examples = [Example(np.arange(3, 11), np.arange(8) > 0)] * 4
    config = settings("-", batch_rows=1, epochs=1, warmup_steps=100, learning_rate=0.001)
    train(decoder, inject(decoder, "lora", 4, 8, 0), examples, [], config, lambda e: rates.append(e.learning_rate))
    assert rates == pytest.approx([0.0005, 0.001, 0.001, 0.0005])
