"""The torch scorer: over float weights it says what llama.cpp says, of a base, an adapter and a scale."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_evaluate import ARC, WINOGRANDE
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import ConfigError, EngineError
from edgelora.evaluate.choices import alternatives, parse_choice
from edgelora.evaluate.protocols import Alternative, Question, Scorer
from edgelora.peft.adapter import write_adapter
from edgelora.peft.soft_prompt import read_trained_prompt
from edgelora.pipeline.engines import choose_engine
from edgelora.pipeline.torch_scorer import TorchScorer
from runtime.scorer import ScoringEngine

# PEFT asks transformers for what it will rename
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUESTIONS = [
    Question([*range(5, 30)], [40, 41, 42, 2]),
    Question([7, 8], [9]),
    Question([*range(60, 100)], []),
    Question([3, 3, 3], [*range(10, 20)]),
]
SCALE = 0.6
NEAR = 2e-2  # nats: llama.cpp keeps keys and values in F16; another scale would be off by whole ones


@pytest.fixture(scope="module")
def room(tiny, tmp_path_factory):
    """`mine`: a strong adapter's folder over the F32 model; `mine.gguf`: its file."""
    room, base = tmp_path_factory.mktemp("torch"), open_base(tiny.path)
    adapter = make_adapter(base, strength=0.2)
    write_adapter(room / "mine", adapter)
    write_adapter_gguf(room / "mine.gguf", adapter, base, "mine")
    return room


@pytest.fixture(params=[0.0, 1.0, SCALE], ids="scale {}".format)
def sides(request, tiny, room) -> tuple[Scorer, Scorer]:
    """The same in torch and in llama.cpp."""
    base = open_base(tiny.path)
    adapters = [(make_adapter(base, strength=0.2), request.param)] if request.param else []
    with ScoringEngine(base, n_ctx=128, n_sequences=4, threads=1) as engine:
        engine.load("mine", room / "mine.gguf")
        engine.use({"mine": request.param})
        yield TorchScorer(base, adapters), engine


def test_answers_and_scores_are_llama_cpps(sides):
    ours, theirs = (side.answer(QUESTIONS, 12) for side in sides)
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.nll, b.nll, atol=NEAR, rtol=0)
    assert any(answer.tokens for answer in ours)


def test_alternatives_and_logits_are_llama_cpps(sides):
    ours, theirs = sides
    for row in (ARC, WINOGRANDE):
        some = alternatives(parse_choice(row), open_base(theirs.base.path).tokenizer)
        for a, b in zip(ours.log_p(some), theirs.log_p(some), strict=True):
            np.testing.assert_allclose(a, b, atol=NEAR, rtol=0)
    asked = [[*range(5, 30)], [7, 8, 9]], [[3, 24], [2]]
    np.testing.assert_allclose(ours.logits(*asked), theirs.logits(*asked), atol=NEAR, rtol=0)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_behind_virtual_tokens_it_says_what_peft_says(tiny, transformers_model, tmp_path, capsys, config):
    torch.manual_seed(0)
    model = get_peft_model(transformers_model(tiny), config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    sequences = [[*range(5, 30)], [7, 8, 9]]
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 0.3)
        theirs = [model(torch.tensor([ids])).logits[0, -1].numpy() for ids in sequences]
    model.save_pretrained(tmp_path / "soft")
    base = open_base(tiny.path)
    scorer = TorchScorer(base, prompt=read_trained_prompt(tmp_path / "soft", base.config))
    found = scorer.logits(sequences, [[len(ids) - 1] for ids in sequences])  # side by side, as an evaluation asks
    np.testing.assert_allclose(found, theirs, atol=1e-4, rtol=0)
    assert np.abs(found - TorchScorer(base).logits(sequences, [[24], [2]])).max() > 0.1
    with pytest.raises(EngineError, match=f"a prompt that needs {base.context + 1} tokens"):
        scorer.log_p([Alternative((5,) * (base.context - 4), 1)])
    (tmp_path / "text.txt").write_text("turn the kitchen lights on and close the blinds\n" * 12, encoding="utf-8")
    words = ["perplexity", str(tiny.path), "--text", str(tmp_path / "text.txt"), "--context", "64", "--chunks", "1",
             "--allow-unverified-base", "--adapter", f"{tmp_path / 'soft'}"]  # fmt: skip
    assert run(words) == 0
    capsys.readouterr()
    assert run([*words[:-1], f"{tmp_path / 'soft'}:0.5"]) == 1
    assert "what stands before a prompt has no scale" in capsys.readouterr().err


def test_more_than_the_context_is_refused(tiny):
    base = open_base(tiny.path)
    with pytest.raises(EngineError, match="prompt and answer together"):
        TorchScorer(base).answer([Question([5] * (base.context - 3), [6])], 12)


def test_it_runs_where_it_can_be_read(tiny, room):
    assert choose_engine("auto", tiny.path, room / "mine.gguf").value == "llama.cpp"
    assert choose_engine("auto", tiny.path, room / "mine").value == "torch"
    assert choose_engine("torch", tiny.path, None).why == "asked for"
    for asked, adapter, said in (
        ("llama.cpp", room / "mine", "is a folder"),
        ("torch", room / "mine.gguf", "is no folder"),
        ("jax", None, "nothing of that name"),
    ):
        with pytest.raises(ConfigError, match=said):
            choose_engine(asked, tiny.path, adapter)


def test_the_commands_take_an_adapters_folder(tiny, room, tmp_path, capsys):
    rows = (ROOT / "examples" / "home" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "task.jsonl").write_text("".join(rows[:3]), encoding="utf-8")
    (tmp_path / "text.txt").write_text("".join(rows[:40]), encoding="utf-8")
    found = {}
    for name in ("mine", "mine.gguf"):
        words = [str(tiny.path), "--adapter", str(room / name), "--allow-unverified-base", "--json"]
        assert run(["eval", *words, "--data", str(tmp_path / "task.jsonl")]) == 0
        task = json.loads(capsys.readouterr().out)
        assert (
            run(["perplexity", *words, "--text", str(tmp_path / "text.txt"), "--context", "64", "--chunks", "3"]) == 0
        )
        found[name] = task, json.loads(capsys.readouterr().out)
    (ours, our_text), (theirs, their_text) = found["mine"], found["mine.gguf"]
    assert (ours["engine"], theirs["engine"]) == ("torch", "llama.cpp")
    assert ours["answers"] == theirs["answers"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert ours["generation_tokens_per_s"] > 0
    assert our_text["perplexity"] == pytest.approx(their_text["perplexity"], rel=1e-3)
    assert our_text["bits_per_byte"] == pytest.approx(their_text["bits_per_byte"], rel=1e-3)
