"""A training run on a tiny Q8_0 model: it learns, repeats under a seed, and leaves one whole adapter or none."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import configs, example_rows
from gguf.constants import GGMLQuantizationType as Type
from torch.nn import functional as F

import edgelora
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.data.dataset import load_examples
from edgelora.data.fit import Encoder
from edgelora.device import processor_name
from edgelora.errors import ConfigError, DataError, EdgeloraError, OutputError
from edgelora.files.contract import read_contract, sha256_file
from edgelora.peft.adapter import TENSORS, read_adapter
from edgelora.peft.inject import attach
from edgelora.training import loop
from edgelora.training.metrics import read_metrics
from edgelora.training.objectives import objective_of
from edgelora.training.objectives.objective import held_out
from edgelora.training.run import run_training
from edgelora.versions import revision

ROOT = Path(__file__).resolve().parent.parent
FILES = ["adapter_config.json", "adapter_model.safetensors", "edgelora.json"]
RUN_FILES = ["checkpoints", "curve.png", "lock", "metrics.jsonl", "run.json"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(24 rows to learn, 8 rows held out) of the example commands."""
    folder = tmp_path_factory.mktemp("data")
    return example_rows(folder / "train.jsonl", 0, 24), example_rows(folder / "valid.jsonl", 24, 32)


@pytest.fixture(scope="module")
def settings(make_tiny, data):
    """`settings(out, **changes)`: a run of six steps over the Q8_0 model, in float32 on every machine."""
    return configs(
        base=make_tiny(Type.Q8_0).path, data=data[0], valid=data[1], rank=4, learning_rate=5e-3, warmup_steps=2,
        epochs=2, dtype="f32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(settings, tmp_path_factory):
    """(run, events, config) of one whole run."""
    config, events = settings(tmp_path_factory.mktemp("run") / "adapter"), []
    return edgelora.train(config, on_progress=events.append), events, config


@pytest.fixture
def broken_steps(monkeypatch):
    """`broken_steps(numbers, value)`: `value` is added to the losses of these steps, counted from 0."""

    def breaks(numbers, value):
        count, real = iter(range(1000)), loop.mean_losses

        def broken(*args, **options):
            added = value if next(count) in numbers else 0.0
            return (scored._replace(loss=scored.loss + added) for scored in real(*args, **options))

        monkeypatch.setattr(loop, "mean_losses", broken)

    return breaks


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what a run learns --------------------------------------------------------------------------------------------


def test_the_loss_falls(ran):
    losses = ran[0].losses
    assert len(losses) == 6  # 24 rows * 2 epochs / 8 rows a step
    assert losses[0] > math.log(512) * 0.9  # a random model knows nothing of its 512 tokens
    assert np.mean(losses[-2:]) < losses[0] - 0.5


def examples_of(base, path):
    return list(load_examples([path], Encoder(base, 1024)))


def loss_over(decoder, examples, settings, max_tokens=768):
    config = settings("-")
    return held_out(objective_of(config), decoder, examples, config, max_tokens)[0]


def test_the_held_out_loss_is_that_of_the_saved_adapter(ran, settings, data):
    run, _, config = ran
    base = open_base(config.base)
    examples, decoder = examples_of(base, data[1]), build_decoder(base)
    before = loss_over(decoder, examples, settings)
    attach(decoder, read_adapter(run.out, base.layers))
    assert loss_over(decoder, examples, settings) == pytest.approx(run.held_out_loss, rel=1e-4)
    assert run.held_out_loss < before
    assert read_metrics(run.folder / "metrics.jsonl")[0].held_out_loss == pytest.approx(before, rel=1e-6)  # step 0


@pytest.mark.parametrize("max_tokens", [64, 768])
def test_held_out_loss_is_that_of_transformers(tiny, data, settings, transformers_model, max_tokens):
    base = open_base(tiny.path)
    examples = examples_of(base, data[1])
    model, nll, n_tokens = transformers_model(tiny), 0.0, 0
    for e in examples:
        ids = torch.from_numpy(e.input_ids)
        learned = torch.from_numpy(e.loss_mask[1:])
        logits = model(ids[None]).logits[0, :-1].detach()
        nll += float(F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
        n_tokens += int(learned.sum())
    ours = loss_over(build_decoder(base), examples, settings, max_tokens)
    assert ours == pytest.approx(nll / n_tokens, rel=1e-5)


# -- determinism --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(ran, settings, tmp_path):
    again = run_training(settings(tmp_path / "again", valid=None))
    assert digest(again.out / TENSORS) == digest(ran[0].out / TENSORS)
    assert again.losses == ran[0].losses


def test_another_seed_gives_another_adapter(ran, settings, tmp_path):
    other = run_training(settings(tmp_path / "other", valid=None, seed=1))
    assert digest(other.out / TENSORS) != digest(ran[0].out / TENSORS)


# -- what a run leaves --------------------------------------------------------------------------------------------


def test_the_folder_holds_three_files_and_the_run_stands_beside_it(ran):
    run = ran[0]
    assert sorted(f.name for f in run.out.iterdir()) == FILES
    assert sorted(f.name for f in run.out.parent.iterdir()) == ["adapter", "adapter.run"]
    assert run.folder == run.out.with_name("adapter.run")
    assert sorted(f.name for f in run.folder.iterdir()) == RUN_FILES
    assert (run.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert read_metrics(run.folder / "metrics.jsonl")[-1].step == run.n_steps


def test_run_json_says_what_was_asked_chosen_and_reached(ran):
    run, _, config = ran
    facts = json.loads((run.folder / "run.json").read_text())
    assert TrainConfig.model_validate(facts["asked"]) == config
    settled = TrainConfig.model_validate(facts["settled"])
    assert settled.alpha == 32  # one α for all ranks
    assert "auto" not in (settled.device, settled.dtype, settled.base_dtype, settled.recompute)
    assert None not in (settled.max_length, settled.micro_batch_tokens)
    assert facts["digests"]["base"] == digest(config.base)
    assert (facts["result"]["steps"], facts["result"]["adapter_of_step"]) == (6, 6)
    assert facts["result"]["held_out_loss"] == run.held_out_loss
    assert {"edgelora", "torch"} <= facts["versions"].keys()
    assert facts["revision"] == revision()
    assert facts["processor"] == processor_name()
    assert (facts["data"]["formats"], facts["data"]["valid"]["rows"]) == ({"chat": 24}, 8)
    assert all(len(facts["digests"][name]) == 64 for name in ("base", "rows", "held-out rows"))
    assert (settled.seed, settled.device) == (0, facts["choices"]["device"]["value"])
    assert facts["result"]["peak_bytes"] == run.peak_bytes > 0
    assert facts["result"]["seconds"] == round(run.seconds, 1) > 0


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
    (source,) = contract.training["data"]
    assert source == {"name": "train.jsonl", "rows": 24, "weight": 1.0, "sha256": digest(data[0])}
    assert (contract.training["steps"], contract.training["seed"], contract.training["rank"]) == (6, 0, 4)
    assert contract.evaluation["held_out_loss"] == run.held_out_loss
    assert contract.evaluation["last_loss"] == run.losses[-1]
    assert {"edgelora", "torch"} <= contract.versions.keys()


def test_every_choice_has_its_reason(ran):
    contract = read_contract((ran[0].out / "edgelora.json").read_text(), "edgelora.json")
    choices = contract.training["choices"]
    assert choices.keys() >= {"device", "dtype", "products", "attention", "threads", "base_dtype", "alpha"}
    assert not choices.keys() & {"rank", "learning_rate"}  # asked for, not chosen
    assert all(choice["value"] and choice["why"] for choice in choices.values())


def test_the_base_is_hashed_while_the_rows_are_read(settings, tmp_path, monkeypatch):
    hashed = threading.Event()

    def hash_file(path):
        digest = sha256_file(path)
        hashed.set()
        return digest

    def load(*_):
        assert hashed.wait(30)
        raise OSError("the rows")

    monkeypatch.setattr("edgelora.base.model.sha256_file", hash_file)
    monkeypatch.setattr("edgelora.training.ready.load_rows", load)
    with pytest.raises(OSError, match="the rows"):
        run_training(settings(tmp_path / "adapter"))


def test_a_base_that_cannot_be_hashed_is_an_error(settings, tmp_path, monkeypatch):
    def hash_file(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("edgelora.base.model.sha256_file", hash_file)
    with pytest.raises(OSError, match="Input/output error"):
        run_training(settings(tmp_path / "adapter"))
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_step(ran):
    events = ran[1]
    assert [(e.stage, e.step, e.total) for e in events] == [("train", i, 6) for i in range(7)]
    assert events[0].loss is None  # the base, before the first step
    assert all(e.held_out_loss is not None for e in events)
    events = events[1:]
    assert [e.loss for e in events] == ran[0].losses
    assert [e.epoch for e in events] == pytest.approx([i / 3 for i in range(1, 7)])
    shares = [0.5, 1, 1, 0.75, 0.5, 0.25]  # two steps up, four down
    assert [e.learning_rate for e in events] == pytest.approx([5e-3 * share for share in shares])
    assert events[-1].eta_s == 0
    assert all(e.tokens_per_s > 0 and e.peak_bytes > 0 and e.grad_norm > 0 for e in events)


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
    with pytest.raises(ConfigError, match=name):
        settings("-", **{name: value})


def test_overwrite_replaces_the_folder(settings, tmp_path):
    out = tmp_path / "adapter"
    first = run_training(settings(out, epochs=0.3, valid=None))
    (out / "note.txt").write_text("of the first run")
    before = digest(first.out / TENSORS)
    run_training(settings(out, epochs=0.3, valid=None, seed=1, overwrite=True))
    assert sorted(f.name for f in out.iterdir()) == FILES
    assert digest(out / TENSORS) != before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "adapter.run"]
    assert [m.step for m in read_metrics(first.folder / "metrics.jsonl")] == [1]  # of the second run alone


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
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "adapter.run"]
    assert (out / "keep.txt").read_text() == "mine"


def test_unknown_targets_are_refused_before_anything_is_written(settings, tmp_path):
    with pytest.raises(ConfigError, match="no linear layer of this model is named q_porj") as e:
        run_training(settings(tmp_path / "adapter", target_modules=["q_porj"]))
    assert e.value.fix == "did you mean q_proj?"
    assert list(tmp_path.iterdir()) == []


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
    assert [f.name for f in tmp_path.iterdir()] == ["adapter.run"]


def test_three_bad_steps_in_a_row_keep_the_last_good_state(settings, tmp_path, broken_steps):
    broken_steps({2, 3, 4}, math.nan)
    out = tmp_path / "adapter"
    with pytest.raises(EdgeloraError, match="3 steps in a row"):
        run_training(settings(out, valid=None))
    assert not out.exists()
    assert [path.name for path in (tmp_path / "adapter.run" / "checkpoints").iterdir()] == ["step-00000005"]
    run = run_training(settings(out, valid=None, resume=True))  # the losses are whole again
    assert (run.n_steps, run.skipped_steps) == (6, 3)
    assert math.isfinite(run.losses[-1])


def test_a_run_whose_last_step_was_skipped_can_be_read_again(settings, broken_steps, tmp_path):
    broken_steps({1}, math.nan)
    out = tmp_path / "adapter"
    run = run_training(settings(out, epochs=2 / 3, valid=None))  # two steps of eight rows
    assert run.skipped_steps == 1
    text = (out / "edgelora.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_contract(text, "edgelora.json").evaluation["last_loss"] is None
