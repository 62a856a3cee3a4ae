"""Prompt tuning, P-tuning and prefix tuning are trained as PEFT trains them, over packed rows, and leave for llama.cpp.

What their files are to the engine, whoever trained them, stands in test_soft_prompt.py.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from resumed import outcome, require_same_when_resumed
from same_tokens import IDS, loss_of
from test_architectures import family  # noqa: F401
from test_resume import data, settings  # noqa: F401
from test_soft_prompt import CONFIG as ENGINE

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.data.encode import Example
from edgelora.data.pack import pack
from edgelora.errors import AdapterError, ConfigError
from edgelora.nn.generate import Until, generate
from edgelora.peft.adapter import CONFIG, write_folder
from edgelora.peft.inject import inject, without_adapter
from edgelora.peft.methods import METHODS
from edgelora.peft.soft_prompt import SAVED, read_trained_prompt
from edgelora.peft.targets import Where
from edgelora.peft.virtual_settings import VirtualTokens
from edgelora.peft.virtual_tokens import begin_as, given, saved
from edgelora.pipeline.export import export
from edgelora.pipeline.inspect_adapter import peft_adapter
from edgelora.pipeline.merge import merge
from edgelora.training.adapter_footprint import adapter_numbers
from edgelora.training.base_footprint import Model
from edgelora.training.defaults import choose
from edgelora.training.footprint import Load, footprint
from edgelora.training.objectives.log_p import token_nll
from edgelora.training.run import run_training
from edgelora.training.settle import settle
from runtime.engine import Engine
from runtime.service import Request, Sampling

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("own_home"),
]

N = 5
PEFT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
KINDS = {
    "prompt": ("prompt_tuning", VirtualTokens(N), PromptTuningConfig(**PEFT)),
    "mlp": ("p_tuning", VirtualTokens(N, encoder_hidden_size=16), PromptEncoderConfig(**PEFT, encoder_hidden_size=16)),
    "lstm": (
        "p_tuning",
        VirtualTokens(N, encoder_reparameterization_type="LSTM"),
        PromptEncoderConfig(**PEFT, encoder_reparameterization_type="LSTM"),
    ),
    "prefix": ("prefix_tuning", VirtualTokens(N), PrefixTuningConfig(**PEFT)),
    "projected": (
        "prefix_tuning",
        VirtualTokens(N, prefix_projection=True),
        PrefixTuningConfig(**PEFT, prefix_projection=True),
    ),
}
BOTH = ["prompt", "prefix"]


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def with_virtual(base, kind, seed=0, **changes):
    """A decoder behind fresh virtual tokens of this kind."""
    method, virtual, _ = KINDS[kind]
    decoder = build_decoder(base)
    inject(decoder, method, 4, 8.0, seed, Where(virtual=replace(virtual, **changes) if changes else virtual))
    return decoder


# -- PEFT is the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same_loss_and_gradients(base, tiny, transformers_model, kind):
    decoder = with_virtual(base, kind)
    theirs = get_peft_model(transformers_model(tiny), copy.copy(KINDS[kind][2])).eval()
    encoder = theirs.prompt_encoder["default"]
    encoder.load_state_dict(decoder.before.state_dict())  # every part has PEFT's name and shape
    labels = IDS.clone()
    labels[0] = -100  # PEFT would learn the first token too, from the last virtual one
    found = theirs(IDS[None], labels=labels[None])
    loss = loss_of(decoder)
    torch.testing.assert_close(loss, found.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0, -len(IDS) :].detach(), atol=1e-4, rtol=1e-5)
    loss.backward()
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    for name, parameter in decoder.before.named_parameters():
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_loss(base, kind):
    """(L(θ + εv) − L(θ − εv)) / 2ε is |∇L| along its direction v."""
    decoder = with_virtual(base, kind)
    loss_of(decoder).backward()
    gradients = [parameter.grad for parameter in decoder.parameters()]
    length = float(torch.cat([g.flatten() for g in gradients]).norm())
    far, losses = 0.01 / length, []  # the loss moves by 0.01
    with torch.no_grad():
        for move in (far, -2 * far):
            for parameter, gradient in zip(decoder.parameters(), gradients, strict=True):
                parameter += move * gradient / length
            losses.append(float(loss_of(decoder)))
    assert (losses[0] - losses[1]) / (2 * far) == pytest.approx(length, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_only_its_own_parameters_are_trained(base, kind):
    decoder = with_virtual(base, kind)
    names = [name for name, _ in decoder.named_parameters()]
    assert names
    assert all(name.startswith("before.") for name in names)
    assert not any(buffer.requires_grad for buffer in decoder.buffers())
    with torch.no_grad(), without_adapter(decoder):
        assert torch.equal(decoder.logits(IDS), build_decoder(base).logits(IDS))
    assert float((decoder.logits(IDS) - build_decoder(base).logits(IDS)).abs().max()) > 0.1


# -- how they begin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])  # two of which scale embeddings, each in its way
def test_begun_as_real_tokens_they_are_those_tokens(family, name, kind):  # noqa: F811
    base = open_base(family(name).folder)
    decoder = with_virtual(base, kind)
    text = list(range(40, 40 + N))
    begin_as(decoder, text)
    wanted = build_decoder(base).logits(torch.tensor([*text, *IDS.tolist()]))[N:]
    torch.testing.assert_close(decoder.logits(IDS), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_the_start(base, kind):
    torch.manual_seed(11)
    starts = [saved(with_virtual(base, kind, seed)) for seed in (0, 0, 1)]
    assert torch.initial_seed() == 11
    assert np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


def test_a_text_is_repeated_or_cut_as_peft_does(base):
    decoder = with_virtual(base, "prompt")
    begin_as(decoder, [7, 8, 9])
    repeated = decoder.embedding.gather(torch.tensor([7, 8, 9, 7, 8]))
    assert np.array_equal(saved(decoder), repeated.numpy())
    begin_as(decoder, range(20, 40))
    assert np.array_equal(saved(decoder), decoder.embedding.gather(torch.arange(20, 25)).numpy())


# -- packed rows --------------------------------------------------------------------------------------------------


def examples(shared):
    draw = np.random.default_rng(0)
    start = draw.integers(3, 500, shared)
    rows = [np.concatenate([start, draw.integers(3, 500, n)]) for n in (9, 1, 30)]
    return [Example(ids, np.arange(len(ids)) > shared) for ids in rows if len(ids) > shared + 1]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("name", "shared"), [("llama", 0), ("llama", 6), ("gemma3_text", 6)])  # which has windows
def test_packed_rows_learn_what_each_alone_does(family, name, kind, shared):  # noqa: F811
    decoder = with_virtual(open_base(family(name).folder), kind)
    rows = examples(shared)
    found = []
    for batches in ([pack(rows)], [pack([row]) for row in rows]):
        nll = torch.cat([token_nll(decoder, batch) for batch in batches])
        (gradient,) = torch.autograd.grad(nll.sum(), list(decoder.parameters()))
        found.append((nll.detach(), gradient))
    assert pack(rows).prefix == shared
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lstm", "projected"])
def test_layers_computed_again_give_the_same_gradients_bit_for_bit(base, kind):
    decoder, found = with_virtual(base, kind), []
    batch = pack(examples(6))
    for decoder.recompute in (False, True):
        found.append(torch.autograd.grad(token_nll(decoder, batch).sum(), list(decoder.parameters())))
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_it_generates_behind_them(family, name, kind):  # noqa: F811
    """Several prompts over cached keys and values: what whole rows say."""
    decoder = with_virtual(open_base(family(name).folder), kind)
    prompts = [IDS[:7].tolist(), IDS[9:12].tolist()]
    for prompt, answer in zip(prompts, generate(decoder, prompts, Until(6)), strict=True):
        logits = decoder.logits(torch.tensor([*prompt, *answer]))
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_an_answer_ends_where_the_context_does(base):
    decoder = with_virtual(base, "prompt")
    (answer,) = generate(decoder, [[5, 6, 7]], Until(9, max_length=N + 3 + 2))
    assert len(answer) == 2


# -- whole runs ---------------------------------------------------------------------------------------------------

RUNS = {
    "prompt": {
        "method": "prompt_tuning", "prompt_tuning_init_text": "turn the lights on", "neftune_alpha": 5.0,
        "samples": ("hello",), "learning_rate": 0.01,
    },
    "lstm": {"method": "p_tuning", "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16,
             "ema_decay": 0.5},
    "prefix": {"method": "prefix_tuning", "recompute": "full", "learning_rate": 0.05},
    "projected": {"method": "prefix_tuning", "prefix_projection": True, "encoder_hidden_size": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(settings, tiny, tmp_path_factory):  # noqa: F811
    """`trained(kind)`: the settings of a run of four steps over the F32 model, done."""
    known = {}

    def train(kind):
        if kind not in known:
            out = tmp_path_factory.mktemp("runs") / kind
            known[kind] = settings(out, base=tiny.path, num_virtual_tokens=N, max_steps=4, eval_every=2, **RUNS[kind])
            run_training(known[kind])
        return known[kind]

    return train


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(trained, kind):
    require_same_when_resumed(trained(kind), 2)


@pytest.mark.parametrize("kind", RUNS)
def test_it_leaves_for_peft_and_for_llama_cpp(trained, base, tiny, transformers_model, tmp_path, kind):
    config = trained(kind)
    decoder = build_decoder(base)
    decoder.before = given(read_trained_prompt(config.out, base.config))
    theirs = PeftModel.from_pretrained(transformers_model(tiny), config.out).eval()
    with torch.no_grad():
        logits = theirs(IDS[None]).logits[0, -len(IDS) :]
    torch.testing.assert_close(decoder.logits(IDS), logits, atol=1e-4, rtol=1e-5)
    certificate = export(tiny.path, config.out, tmp_path / "it.gguf")  # signed: its contract names this base
    assert certificate.passed
    assert certificate.adapter.kl_mean <= 1e-5
    assert certificate.adapter.worst_flip_nats <= 1e-2  # of a random model some tokens are as likely as others
    with Engine.open(tiny.path, ENGINE) as engine:
        engine.load("it", tmp_path / "it.gguf")
        request = Request(tuple(IDS.tolist()), {"it": 1.0}, max_tokens=1, sampling=Sampling())
        assert [token for piece in engine.generate(request) for token in piece.tokens] == [int(logits[-1].argmax())]


def test_what_there_is_to_improve_on_is_the_base(trained, settings, tiny, tmp_path):  # noqa: F811
    """Before the first step nothing has been learned: the held-out loss is that of no prompt at all."""
    lora = settings(tmp_path / "lora", base=tiny.path, max_steps=1, eval_every=1)
    run_training(lora)
    curves = [outcome(config.out).curve for config in (lora, trained("prompt"))]
    assert curves[0][0] == curves[1][0]


# -- plan, settings and words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_the_plan_counts_them(settings, base, tiny, tmp_path, kind):  # noqa: F811
    config = settings(tmp_path / "it", base=tiny.path, num_virtual_tokens=N, **RUNS[kind])
    planned = settle(config, base)
    assert planned.config.max_length == 512 - N
    assert f"the base's context is 512, {N} of it virtual tokens" in planned.choices["max_length"].why
    model, decoder = Model.of(base), with_virtual(base, kind, encoder_hidden_size=config.encoder_hidden_size)
    assert adapter_numbers(model, planned.config) == sum(p.numel() for p in decoder.parameters())
    one = planned.config.model_copy(update={"num_virtual_tokens": 1})
    rows = [footprint(model, planned.config, Load(64, 32, True)), footprint(model, one, Load(63 + N, 31 + N, True))]
    assert rows[0].activations == rows[1].activations  # of as long a row


def test_a_folder_of_it_is_inspected_without_a_base(trained, tiny, tmp_path):
    facts = peft_adapter(trained("prefix").out)
    assert (facts.method, facts.base, facts.parameters, facts.faults) == ("prefix_tuning", tiny.path.name, N * 512, [])
    assert (facts.export.answer, facts.merge.answer, facts.chat.answer) == ("yes", "no", "export first")
    broken = tmp_path / "broken"
    write_folder(broken, {"peft_type": "P_TUNING"}, {SAVED: np.full((2, 3), np.nan, np.float32)}, None)
    facts = peft_adapter(broken)
    assert facts.faults == ["prompt_embeddings holds NaN or infinite values"]
    assert (facts.method, facts.export.answer, facts.chat.answer) == ("p_tuning", "no", "no")


def test_a_folder_of_it_cannot_be_merged(trained, tiny, tmp_path):
    with pytest.raises(AdapterError, match="stands before prompts, not in weights: `edgelora export` it") as refused:
        merge(tiny.path, [(trained("prompt").out, 1.0)], tmp_path / "merged.gguf")
    assert "another base" not in refused.value.why
    assert "`edgelora export BASE FOLDER --out FILE`" in refused.value.fix


def test_there_must_be_room_for_a_prompt(settings, tiny, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError) as error:
        run_training(settings(tmp_path / "it", base=tiny.path, method="prompt_tuning", num_virtual_tokens=512))
    assert str(error.value).splitlines() == [
        "--num-virtual-tokens 512: this base sees 512 tokens in all",
        "  why: they stand before every prompt, and leave no room for one",
        "  fix: leave it out: 20 do nearly as well as more",
    ]


@pytest.mark.parametrize(
    ("kind", "rates"),
    [("prompt", (3e-2, 1e-3)), ("prefix", (3e-2, 5e-3)), ("projected", (3e-3, 5e-4)), ("lstm", (1e-2, 5e-4))],
)
def test_the_learning_rate_is_another_than_a_loras(settings, tmp_path, kind, rates):  # noqa: F811
    for size, rate in zip((135e6, 3e9), rates, strict=True):
        config, _ = choose(settings(tmp_path, **{**RUNS[kind], "learning_rate": None}), int(size))
        assert config.learning_rate == rate


REFUSED = [
    ("num_virtual_tokens", "lora", {"num_virtual_tokens": 8}),
    ("prefix_projection", "lora", {"prefix_projection": True}),
    ("prefix_projection", "p_tuning", {"prefix_projection": True}),
    ("encoder_hidden_size", "prefix_tuning", {"encoder_hidden_size": 8}),
    ("prompt_tuning_init", "prefix_tuning", {"prefix_projection": True, "prompt_tuning_init_text": "be kind"}),
    ("target_modules", "prompt_tuning", {"target_modules": ("q_proj",)}),
    ("lora_dropout", "prefix_tuning", {"lora_dropout": 0.5}),
]


@pytest.mark.parametrize(("name", "method", "given_"), REFUSED)
def test_a_setting_without_a_use_is_refused(settings, tiny, tmp_path, name, method, given_):  # noqa: F811
    with pytest.raises(ConfigError, match=f"^{name}: nothing that --method {method} could use"):
        run_training(settings(tmp_path / "it", base=tiny.path, method=method, **given_))
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"prompt_tuning_init": "text"}, "--prompt-tuning-init text without --prompt-tuning-init-text"),
        (
            {"prompt_tuning_init": "random", "prompt_tuning_init_text": "a"},
            "--prompt-tuning-init random with --prompt-tuning-init-text",
        ),
    ],
)
def test_a_text_and_another_start_contradict_each_other(settings, tiny, tmp_path, given_, said):  # noqa: F811
    with pytest.raises(ConfigError) as error:
        run_training(settings(tmp_path / "it", base=tiny.path, method="prompt_tuning", **given_))
    assert str(error.value).splitlines() == [
        said,
        "  why: a text is what virtual tokens begin as, or they begin as something else",
        "  fix: pass --prompt-tuning-init-text alone, or leave it out",
    ]


def test_the_folder_says_what_peft_asks_for(trained):
    said = json.loads((trained("prefix").out / CONFIG).read_text(encoding="utf-8"))
    assert said == {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(trained("prefix").base),
        "inference_mode": True, "num_virtual_tokens": N, "token_dim": 128, "num_transformer_submodules": 1,
        "num_attention_heads": 2, "num_layers": 2, "encoder_hidden_size": 128, "prefix_projection": False,
    }  # fmt: skip


def test_methods_tells_of_the_door(capsys):
    assert run(["methods", "--json"]) == 0
    rows = {row["name"]: row["leaves_as"] for row in json.loads(capsys.readouterr().out)}
    ours = {method for method, _, _ in KINDS.values()}
    assert ours == {name for name, row in METHODS.items() if row.before is not None}
    assert all(rows[name] == ["soft prompt"] for name in ours)
    assert all("soft prompt" not in doors for name, doors in rows.items() if name not in ours)
