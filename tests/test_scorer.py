"""The scoring engine: whatever was switched before, answers and scores are those of a fresh one."""

from __future__ import annotations

import random
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType
from live_walk import strong_adapters
from test_export import make_adapter
from test_preflight import write_foreign as write_foreign_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from converters.soft_prompt_to_gguf import write_soft_prompt_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.data.encode import Example, encode_conversation
from edgelora.data.rows import Conversation
from edgelora.errors import AdapterError, DataError, EdgeloraError, EngineError, FileFormatError
from edgelora.evaluate.protocols import Answer, Question
from edgelora.evaluate.score import bootstrap, questions, score
from edgelora.peft.soft_prompt import TrainedPrompt
from edgelora.pipeline.check_rows import DEFAULT_CHECK
from runtime.binding import Model
from runtime.scorer import ScoringEngine

NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Three strong adapters over the F32 model (over float weights a warm and a cold run agree token for token)."""
    return strong_adapters(open_base(tiny.path), tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture
def engine(tiny, adapters):
    with ScoringEngine(open_base(tiny.path), n_ctx=256, n_sequences=4, threads=1) as engine:
        for name, path in adapters.items():
            engine.load(name, path)
        yield engine


def last_logits(engine, active, prompt):
    engine.use(active)
    return engine.logits([prompt], [[len(prompt) - 1]])


def cold(tiny, adapters, active, prompt):
    with ScoringEngine(open_base(tiny.path), n_ctx=256, n_sequences=4, threads=1) as engine:
        for name in active:
            engine.load(name, adapters[name])
        return last_logits(engine, active, prompt)


def test_nothing_of_one_adapter_is_left_for_another(engine, tiny, adapters):
    settings = [{}, {"one": 1.0}, {"two": 1.0}, {"one": 0.5}, {"one": 1.0, "three": -0.7}]
    prompts = [[*range(5, 30)], [*range(5, 25), 99, 98], [*range(5, 30), 40, 41, 42]]
    expected = [[cold(tiny, adapters, active, prompt) for prompt in prompts] for active in settings]
    draw = random.Random(0)
    for _ in range(60):
        i, j = draw.randrange(len(settings)), draw.randrange(len(prompts))
        if draw.random() < 0.2:
            engine.load("two", adapters["two"])
        np.testing.assert_array_equal(last_logits(engine, settings[i], prompts[j]), expected[i][j])
    assert len({rows[0].tobytes() for rows in expected}) == len(settings)


def test_questions_that_do_not_fit_one_decode_wait_for_the_next(tiny):
    draw = np.random.default_rng(1)
    asked = [Question(draw.integers(3, 500, 150).tolist(), draw.integers(3, 500, 200).tolist()) for _ in range(5)]
    with ScoringEngine(open_base(tiny.path), n_ctx=384, n_sequences=3, threads=1) as engine:
        engine._context.n_batch = 384  # as if many more sequences shared it
        found = engine.answer(asked, 3)
        assert [len(a.nll) for a in found] == [200] * 5
        assert engine.answer([], 3) == []


def test_scale_zero_is_the_base(engine, tiny, adapters):
    engine.use({"one": 0.0})
    assert engine.active == {}
    np.testing.assert_array_equal(engine.logits([[5, 6, 7]], [[2]]), cold(tiny, adapters, {}, [5, 6, 7]))


def test_unloading_frees_the_name_and_the_others_stay(engine):
    engine.use({"one": 1.0, "two": 0.5})
    engine.unload("one")
    assert engine.active == {"two": 0.5}
    with pytest.raises(AdapterError, match="no adapter named one"):
        engine.use({"one": 1.0})


@pytest.mark.parametrize("scale", [17.0, -17.0, float("nan"), float("inf")])
def test_scales_beyond_reason_are_refused(engine, scale):
    with pytest.raises(EngineError, match="scale"):
        engine.use({"one": scale})


def test_answers_and_scores_of_many_questions_are_those_of_one_at_a_time(engine):
    draw = np.random.default_rng(0)
    shared = [1, 9, 9, 9]
    asked = [
        Question([*shared, *draw.integers(3, 500, n).tolist()], draw.integers(3, 500, n % 4 + 1).tolist())
        for n in (5, 1, 9, 3, 12, 7, 2, 4, 6)
    ]
    together = engine.answer(asked, 5)
    for question, found in zip(asked, together, strict=True):
        (alone,) = engine.answer([question], 5)
        assert found.tokens == alone.tokens
        np.testing.assert_allclose(found.nll, alone.nll, atol=1e-3)


def test_the_score_of_a_reference_is_its_log_probability_in_torch(engine, tiny):
    base = open_base(tiny.path)
    example: Example = encode_conversation(DEFAULT_CHECK[0], base.tokenizer, base.template)
    ids, first = example.input_ids, int(np.argmax(example.loss_mask))
    last = int(example.loss_mask.nonzero()[0][-1]) + 1
    (found,) = engine.answer([Question(ids[:first].tolist(), ids[first:last].tolist())], 3)
    log_p = build_decoder(base).logits(torch.from_numpy(ids)).log_softmax(-1)
    wanted = [-float(log_p[i - 1, ids[i]]) for i in range(first, last)]
    np.testing.assert_allclose(found.nll, wanted, atol=0.03)  # the KV is F16


def test_scoring_tells_the_groups_apart(tiny):
    class Parrot:
        """Answers every question with its reference, but the first."""

        def answer(self, questions, max_tokens, _):
            assert max_tokens > max(len(q.reference) for q in questions)
            return [
                Answer([] if i == 0 else list(q.reference[:-1]), np.ones(len(q.reference)))
                for i, q in enumerate(questions)
            ]

    base = open_base(tiny.path)
    rows = [replace(row, group="new" if i % 2 else "known") for i, row in enumerate(DEFAULT_CHECK)]
    found = score(Parrot(), rows, questions(rows, base.tokenizer, base.template), base.tokenizer)
    assert (found.all.exact, found.groups["known"].exact, found.groups["new"].exact) == (7, 3, 4)
    assert found.all.loss == 1.0


def test_an_answer_of_weight_0_is_no_reference(tiny):
    base = open_base(tiny.path)
    asked, answered = DEFAULT_CHECK[0].messages[-2:]
    unscored = Conversation((asked, replace(answered, weight=0.0)))
    learned_before = Conversation((asked, answered, asked, replace(answered, weight=0.0)))
    for row in (unscored, learned_before):
        with pytest.raises(DataError) as fault:
            questions([DEFAULT_CHECK[0], row], base.tokenizer, base.template)
        assert str(fault.value).splitlines() == [
            "row 2: its last answer has the weight 0",
            "  why: the last answer is what is scored, and this one is marked as no answer to give",
            "  fix: give it a weight, or leave the row out",
        ]


def test_the_interval_covers_the_share_and_narrows_with_rows():
    low, high = bootstrap([True] * 9 + [False])
    wide, narrow = high - low, np.diff(bootstrap(([True] * 9 + [False]) * 40))[0]
    assert low <= 0.9 <= high
    assert narrow < wide / 3


def test_a_context_longer_than_the_base_was_trained_on_is_refused(tiny):
    with pytest.raises(EngineError, match="513 tokens"):
        ScoringEngine(open_base(tiny.path), n_ctx=513)


def test_another_chat_template_or_tokenizer_is_another_base(make_tiny, adapters):
    other = make_tiny(template="{{ messages[0]['content'] }}<|im_end|>")
    with (
        ScoringEngine(open_base(other.path), n_ctx=64, threads=1) as engine,
        pytest.raises(AdapterError, match="the chat template is another one"),
    ):
        engine.load("one", adapters["one"])


def test_a_prompt_longer_than_the_context_is_refused(engine):
    with pytest.raises(EngineError, match="300 tokens"):
        engine.answer([Question([5] * 299, [6])], 1)


def test_closed_handles_say_so(tiny):
    engine = ScoringEngine(open_base(tiny.path), n_ctx=64, threads=1)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.logits([[5, 6]], [[1]])
    model = Model(tiny.path, vocabulary_only=True)
    model.close()
    with pytest.raises(EngineError, match="closed"):
        _ = model.handle


def test_a_foreign_adapter_must_be_allowed(tiny, tmp_path, engine):
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    write_adapter_gguf(tmp_path / "f.gguf", type(adapter)(adapter.config, adapter.tensors), base, "f")
    with pytest.raises(AdapterError, match="does not say which base"):
        engine.load("f", tmp_path / "f.gguf")
    engine.load("f", tmp_path / "f.gguf", allow_unverified=True)


def test_an_adapter_of_another_base_is_refused(make_tiny, adapters):
    with (
        ScoringEngine(open_base(make_tiny(seed=7).path), n_ctx=64, threads=1) as engine,
        pytest.raises(AdapterError, match="does not belong to"),
    ):
        engine.load("one", adapters["one"])


def write_foreign(path, tensors, alpha=("float32", 4.0), **strings):
    writer = gguf.GGUFWriter(path, strings.pop("architecture", "llama"))
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **strings}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    if alpha:
        getattr(writer, f"add_{alpha[0]}")("adapter.lora.alpha", alpha[1])
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(name, rank=4, rows=256, columns=256, dtype=np.float32, value=0.01):
    return {
        f"{name}.lora_a": np.full((rank, columns), value, dtype),
        f"{name}.lora_b": np.full((rows, rank), value, dtype),
    }


Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("tensors", "options", "named"),
    [
        (pair(Q), {"alpha": ("uint32", 4)}, "adapter.lora.alpha"),
        (pair(Q), {"alpha": ("float64", 4.0)}, "adapter.lora.alpha"),
        (pair(Q), {"alpha": None}, "adapter.lora.alpha is missing"),
        (pair(Q), {"alpha": ("float32", float("nan"))}, "adapter.lora.alpha"),
        (pair(Q), {"general.type": 3}, "general.type"),
        (pair(Q), {"general.type": "model"}, "general.type"),
        (pair(Q), {"adapter.type": "dora"}, "adapter.type"),
        (pair(Q), {"architecture": "qwen2"}, "general.architecture"),
        (pair(Q, dtype=np.int32, value=1), {}, "I32"),
        (pair(Q, dtype=np.float64), {}, "F64"),
        (pair(Q, value=np.nan), {}, "NaN"),
        (pair(Q, value=np.inf), {}, "NaN or infinite"),
        (pair(Q, columns=128), {}, "expected (r, 256)"),
        (pair(Q, rows=128), {}, "expected (256, r)"),
        (pair("token_embd.weight", rows=512), {}, "cannot adapt"),
        (pair("output.weight", rows=512), {}, "no counterpart"),
        (pair("blk.7.attn_q.weight"), {}, "no counterpart"),
        (pair("output_norm.weight", rows=1), {}, "cannot adapt"),
        ({f"{Q}.lora_a": np.zeros((4, 256), np.float32)}, {}, "without its other half"),
        ({k: v[None] for k, v in pair(Q).items()}, {}, "3 dimensions"),
        ({}, {}, "no tensors"),
        (pair(Q), {"adapter.alora.invocation_tokens": 5}, "invocation"),
    ],
)
def test_files_that_crash_llama_cpp_never_reach_it(engine, tmp_path, tensors, options, named):
    write_foreign(tmp_path / "bad.gguf", tensors, **options)
    with pytest.raises((AdapterError, FileFormatError)) as error:
        engine.load("bad", tmp_path / "bad.gguf", allow_unverified=True)
    assert named in str(error.value)
    assert np.isfinite(engine.logits([[5, 6, 7]], [[2]])).all()  # and the engine is alive


def test_what_only_a_trial_can_tell_is_told(engine, tmp_path):
    write_foreign(tmp_path / "bad.gguf", pair(Q, value=1e30))  # finite, and its product is not
    with pytest.raises(AdapterError, match=r"llama\.cpp cannot run it"):
        engine.load("bad", tmp_path / "bad.gguf", allow_unverified=True)
    assert "bad" not in engine.active


def test_what_is_not_active_from_the_first_token_on_is_not_scored(engine, tmp_path):
    waits = {"adapter.alora.invocation_tokens": ([7, 8], GGUFValueType.ARRAY, GGUFValueType.UINT32)}
    write_foreign_adapter(tmp_path / "alora.gguf", pair(Q), **waits)
    with pytest.raises(AdapterError, match=r"waits for an invocation.*not scored"):
        engine.load("alora", tmp_path / "alora.gguf", allow_unverified=True)
    soft = TrainedPrompt(embeddings=np.full((3, 256), 0.01, np.float32))
    write_soft_prompt_gguf(tmp_path / "soft.gguf", soft, engine.base, "soft")
    with pytest.raises(AdapterError, match="stands before a prompt, which is not scored"):
        engine.load("soft", tmp_path / "soft.gguf", allow_unverified=True)


def test_a_whole_model_is_no_adapter(engine, tiny):
    with pytest.raises(AdapterError) as error:
        engine.load("bad", tiny.path, allow_unverified=True)
    assert str(error.value).splitlines() == [
        f"{tiny.path}: general.type is 'model', expected 'adapter'",
        "  why: it is no adapter, but a whole model",
        "  fix: pass a model as the base; an adapter for it is what `edgelora export` writes",
    ]


def test_a_truncated_adapter_is_refused(engine, adapters, tmp_path):
    whole = adapters["one"].read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(EdgeloraError):
            engine.load("cut", tmp_path / "cut.gguf")


def test_a_file_llama_cpp_cannot_load_is_a_typed_error(tmp_path):
    (tmp_path / "not.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(EngineError, match="cannot load"):
        Model(tmp_path / "not.gguf")
