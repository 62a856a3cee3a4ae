"""aLoRA against PEFT, and llama.cpp in our engine: who acts on which token; packed, generated, exported, refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pefts import require_pefts_gradients

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.data.encode import Example, encode_prompt
from edgelora.data.pack import pack, unshared
from edgelora.data.rows import Message
from edgelora.errors import AdapterError, ConfigError, DataError
from edgelora.files.adapter_check import INVOCATION_KEY
from edgelora.files.gguf import GGUFFile
from edgelora.nn.awake import NEVER, Awake, AwakeLora, last_place
from edgelora.nn.generate import Until, generate
from edgelora.peft.adapter import CONFIG, INVOCATION, Adapter, read_adapter, write_adapter
from edgelora.peft.inject import adapter_config, attach, collect, inject, without_adapter
from edgelora.peft.targets import Where
from edgelora.pipeline.export import ExportOptions, export
from edgelora.training.invoked import invocation_of, require_invoked
from edgelora.training.objectives.log_p import answers, learned
from edgelora.training.run import run_training
from runtime.engine import Engine
from runtime.service import EngineConfig, Request, Sampling

# PEFT asks transformers for what it will rename
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("own_home"),
]

INVOKED = (7, 8, 9)
RANK, ALPHA = 4, 6
LOGPROBS = Sampling(logprobs=0)
IDS = torch.randint(20, 512, (24,), generator=torch.Generator().manual_seed(5))
IDS[4:7] = IDS[13:16] = torch.tensor(INVOKED)
AT = 13
WHERE = Where(alora_invocation_tokens=INVOKED)


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def decoder(base):
    """With an aLoRA that has learned something."""
    decoder = build_decoder(base)
    inject(decoder, "alora", RANK, ALPHA, seed=0, targets=WHERE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * (torch.rand(parameter.shape, generator=generator) - 0.5))
    return decoder


def written(decoder, base, folder):
    adapter = Adapter(adapter_config(decoder, "alora", RANK, ALPHA, str(base.path), WHERE), collect(decoder))
    write_adapter(folder, adapter)
    return adapter


def hidden(decoder, ids):
    return decoder(ids, torch.arange(len(ids)), [0, len(ids)])


# -- PEFT is the oracle -------------------------------------------------------------------------------------------


def test_peft_computes_the_same_outputs_and_gradients(base, decoder, tiny, transformers_model, tmp_path):
    written(decoder, base, tmp_path / "mine")
    theirs = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine", is_trainable=True).eval()
    found = theirs(input_ids=IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)

    decoder.nll(hidden(decoder, IDS)[:-1], IDS[1:]).mean().backward()
    found.loss.backward()
    require_pefts_gradients(decoder, theirs)


def test_what_peft_saved_computes_the_same_here(base, tiny, transformers_model, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM",
        alora_invocation_tokens=list(INVOKED),
    )  # fmt: skip
    theirs = get_peft_model(transformers_model(tiny), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:  # PEFT's random B is strong enough to amplify rounding
            parameter.data *= 0.3
    theirs.save_pretrained(tmp_path)
    decoder = build_decoder(base)
    before = decoder.logits(IDS)
    attach(decoder, read_adapter(tmp_path, base.layers, may_wait=True))
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(input_ids=IDS[None]).logits[0], atol=1e-4, rtol=1e-4)
    assert float((decoder.logits(IDS) - before).abs().max()) > 0.1


# -- which tokens -------------------------------------------------------------------------------------------------


def test_before_its_last_invocation_it_is_the_base(base, decoder):
    plain, live = build_decoder(base).logits(IDS), decoder.logits(IDS)
    torch.testing.assert_close(live[:AT], plain[:AT])
    assert float((live[AT:] - plain[AT:]).abs().amax(-1).min()) > 0.01
    with without_adapter(decoder):
        assert torch.equal(decoder.logits(IDS), plain)


@pytest.mark.parametrize(
    ("ids", "place"),
    [([1, 7, 8, 9], 1), ([7, 8, 9, 7, 8, 9], 3), ([7, 8], NEVER), ([7, 8, 7, 9], NEVER), ([7, 7, 8, 9, 7, 8], 1)],
)
def test_the_last_whole_invocation_counts(ids, place):
    assert last_place(INVOKED, np.array(ids)) == place


def test_the_gradient_is_that_of_the_function():
    def draw(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    weight, rows = draw(7, 5, seed=0), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    inputs = [draw(4, 5, seed=1), draw(3, 5, seed=2), draw(7, 3, seed=3)]

    class Exact:
        def dequantize(self, _):
            return weight

    def function(x, a, b):
        return AwakeLora.apply(x, Exact(), rows, 1.7, a, b)

    x, a, b = inputs
    torch.testing.assert_close(function(x, a, b), x @ weight.T + rows * 1.7 * (x @ a.T @ b.T))
    assert torch.autograd.gradcheck(function, [one.requires_grad_() for one in inputs])


def example(*parts):
    """Ids of which the last part is learned."""
    ids = np.concatenate([np.array(part) for part in parts])
    return Example(ids.astype(np.int64), np.arange(len(ids)) >= len(ids) - len(parts[-1]))


ASK = list(range(30, 40))
PACKED = {
    "of one prompt": [example(ASK, INVOKED, [50, 51]), example(ASK, INVOKED, [60, 61, 62])],
    "that begin alike": [example(ASK, [5], INVOKED, [50, 51]), example(ASK, [6], INVOKED, [60])],
    "one of which is invoked again": [
        example(ASK, INVOKED, [50, 51]), example(ASK, INVOKED, [50, 41, 42], INVOKED, [60, 61])
    ],
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", PACKED.values(), ids=PACKED)
def test_packed_rows_learn_as_each_alone(decoder, rows, recompute):
    decoder.recompute = recompute
    batch = pack(rows)
    assert batch.prefix >= len(ASK)
    gradients = []
    for batches in ([batch], [pack([row]) for row in rows]):
        decoder.zero_grad()
        found = torch.cat([answers(decoder, one).log_p for one in batches])
        found.sum().backward()
        gradients.append([found.detach(), *(parameter.grad.clone() for parameter in decoder.parameters())])
    for together, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_row_that_shares_nothing_is_the_same_row():
    batch = pack(PACKED["that begin alike"])
    alone = unshared(batch)
    assert alone.prefix == 0
    assert alone.segment_starts == (0, 16, 31)
    assert alone.input_ids.tolist() == [*ASK, 5, *INVOKED, 50, 51, *ASK, 6, *INVOKED, 60]
    assert alone.labels[learned(alone)].tolist() == batch.labels[learned(batch)].tolist()
    assert alone.positions.tolist() == [*range(16), *range(15)]
    again = pack(PACKED["one of which is invoked again"])
    assert not Awake(INVOKED).shares(again.input_ids, again.segment_starts, again.prefix)


def test_answers_grow_as_if_read_at_once(decoder):
    """The longest first ends first: who is awake from where on is kept for those that go on."""
    prompts = [IDS[:20].tolist(), [*ASK], [*INVOKED, *ASK[:5]]]
    found = generate(decoder, prompts, Until(6, stop=[int(decoder.logits(torch.tensor(prompts[1]))[-1].argmax())]))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([*prompt, *answer])
        assert decoder.logits(ids[:-1])[len(prompt) - 1 :].argmax(-1).tolist() == answer
    assert [len(answer) for answer in found][1] == 1
    assert decoder.awake.begins is None


# -- its way out --------------------------------------------------------------------------------------------------


def test_the_engine_computes_the_same_from_the_file(base, decoder, tmp_path):
    adapter = written(decoder, base, tmp_path / "mine")
    write_adapter_gguf(tmp_path / "mine.gguf", adapter, base, "mine", "F32")
    prompts = [IDS[:n].tolist() for n in (7, 10, 12, 16, 20, 24)]
    with Engine.open(base.path, EngineConfig(context=256, chunk=8, threads=1)) as engine:
        engine.load("mine", tmp_path / "mine.gguf", allow_unverified=True)
        found = [
            next(iter(engine.generate(Request(tuple(ids), {"mine": 1.0}, max_tokens=1, sampling=LOGPROBS)))).logprobs[0]
            for ids in prompts
        ]

    def likeliest():
        best = [decoder.logits(torch.tensor(ids))[-1].log_softmax(-1).max(-1) for ids in prompts]
        return [int(one.indices) for one in best], np.array([float(one.values) for one in best])

    tokens, wanted = likeliest()
    decoder.awake.begins = [0]
    _, always = likeliest()
    with without_adapter(decoder):
        _, never = likeliest()
    assert [one.token for one in found] == tokens
    there = np.array([one.logprob for one in found])
    np.testing.assert_allclose(there, wanted, atol=1e-2)  # keys and values are F16 there
    assert min(np.abs(there - always).max(), np.abs(there - never).max()) > 0.05


def test_export_certifies_it(base, decoder, tmp_path):
    adapter = written(decoder, base, tmp_path / "mine")
    rows = [  # the first answer of the second is the base's
        {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 3, turns, strict=False)]}
        for turns in (("light", "on"), ("light", "on", "and now", "off"), ("a", "b"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    waits = dict(adapter.config) | {INVOCATION: [1, *base.tokenizer.encode("assistant").ids]}
    write_adapter(tmp_path / "mine", replace(adapter, config=waits), overwrite=True)
    options = ExportOptions(data=tmp_path / "rows.jsonl", allow_unverified=True)
    export(base.path, tmp_path / "mine", tmp_path / "mine.gguf", options)
    file = GGUFFile(tmp_path / "mine.gguf")
    assert file.metadata[INVOCATION_KEY].data.tolist() == waits[INVOCATION]


def test_no_weight_can_hold_it(base, decoder, tmp_path):
    written(decoder, base, tmp_path / "mine")
    with pytest.raises(AdapterError, match="it acts from there on") as e:
        read_adapter(tmp_path / "mine", base.layers)
    assert "edgelora export" in e.value.fix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "alora_invocation_tokens is set in a DoRA"),
        ({"alora_invocation_tokens": "hello"}, "expected token ids"),
        ({"alora_invocation_tokens": [-1]}, "expected token ids"),
        ({"alora_invocation_tokens": [5, 512]}, "alora_invocation_tokens holds 512, and the base has 512 tokens"),
    ],
)
def test_a_strange_one_is_refused(base, decoder, tmp_path, change, said):
    written(decoder, base, tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / CONFIG).read_text())
    (tmp_path / "mine" / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(AdapterError) as e:
        read_adapter(tmp_path / "mine", base.layers, may_wait=True)
    assert said in e.value.what


# -- a run --------------------------------------------------------------------------------------------------------


def config_of(base, folder, **settings):
    return TrainConfig(
        base=base.path, data=folder / "rows.jsonl", out=folder / "out", **{"method": "alora", **settings}
    )


def test_it_waits_for_what_the_template_writes_before_an_answer(base, tmp_path):
    settled, why = invocation_of(config_of(base, tmp_path), base)
    text = b"".join(base.tokenizer.piece(i, special=True) for i in settled.alora_invocation_tokens).decode()
    assert text == "<|im_start|>assistant"
    assert "before an answer" in why["invocation"].why
    assert invocation_of(settled, base)[0] == settled  # a run that goes on
    own, _ = invocation_of(config_of(base, tmp_path, invocation="<|im_start|>x"), base)
    assert own.alora_invocation_tokens == (1, *base.tokenizer.encode("x").ids)


def test_what_it_waits_for_stands_so_in_a_prompt_of_sentencepiece(stories, tmp_path):
    """Which begins a text by itself with a blank, and has no token for what ChatML begins a turn with."""
    base = open_base(stories, "chatml")
    waits = invocation_of(config_of(base, tmp_path), base)[0].alora_invocation_tokens
    alone = base.tokenizer.encode("<|im_start|>assistant", parse_special=True).ids
    prompt = np.array(encode_prompt([Message("user", "hello")], base.tokenizer, base.template))
    assert last_place(alone, prompt) == NEVER
    assert alone[-len(waits) :] == list(waits)
    assert 0 < last_place(waits, prompt) < len(prompt) - len(waits)  # a line ends behind it


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "lora", "invocation": "x"}, "nothing that --method lora could use"),
        ({"invocation": "x", "alora_invocation_tokens": (5,)}, "invocation and alora_invocation_tokens"),
        ({"alora_invocation_tokens": (5, 512)}, "512 is no token"),
        ({"alora_invocation_tokens": (5,) * 300}, "300 tokens"),
    ],
)
def test_what_it_cannot_wait_for_is_refused(base, tmp_path, settings, said):
    with pytest.raises(ConfigError) as e:
        invocation_of(config_of(base, tmp_path, **settings), base)
    assert said in e.value.what


def test_what_it_could_not_learn_is_refused(base, tmp_path):
    config = config_of(base, tmp_path, alora_invocation_tokens=INVOKED)
    require_invoked(config, PACKED["of one prompt"], "data")
    for row in (example(ASK, [50]), example(INVOKED, [50], INVOKED), example(ASK, [7, 8, 9])):
        with pytest.raises(DataError) as e:
            require_invoked(config, [*PACKED["of one prompt"], row], "data")
        assert e.value.what.startswith("data, row 3: what is learned begins before")
        assert "--loss-on last" in e.value.fix


def test_a_run_writes_one_that_says_what_it_waits_for(base, tmp_path):
    rows = [{"messages": [{"role": r, "content": c} for r, c in (("user", "light"), ("assistant", "on"))]}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_training(config_of(base, tmp_path, rank=4, alpha=8, max_steps=2, batch_rows=2, device="cpu"))
    adapter = read_adapter(run.out, base.layers, may_wait=True)
    assert adapter.invocation == (1, *base.tokenizer.encode("assistant").ids)
    assert any(parts["lora_B"].any() for parts in adapter.tensors.values())
