"""LongLoRA: its attention against one dense mask, its file against PEFT's, and runs that attend to groups alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from resumed import require_same_when_resumed, run_folder
from same_tokens import IDS
from test_resume import data, settings  # noqa: F401

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.data.encode import Example
from edgelora.data.pack import pack
from edgelora.errors import ConfigError
from edgelora.nn.scores import Scores
from edgelora.nn.shifted import borders, shifted_attention
from edgelora.peft.adapter import PREFIX, Adapter, read_adapter, write_adapter
from edgelora.peft.inject import adapter_config, attach, collect, inject
from edgelora.peft.longlora import attend_in_groups
from edgelora.training.metrics import read_metrics
from edgelora.training.objectives.log_p import answers
from edgelora.training.run import run_training
from edgelora.training.where import group_of, where_of

# PEFT asks transformers for what it will rename
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("own_home"),
]

RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def decoder(base):
    """With a LongLoRA that has learned something."""
    decoder = build_decoder(base)
    inject(decoder, "longlora", RANK, ALPHA, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.add_((0.8 if name.endswith("norm.delta.weight") else 0.1) * noise)
    return decoder


def written(decoder, base, folder):
    adapter = Adapter(adapter_config(decoder, "longlora", RANK, ALPHA, str(base.path)), collect(decoder))
    write_adapter(folder, adapter)
    return adapter


# -- attention ----------------------------------------------------------------------------------------------------


def dense(q, k, v, starts, group, scale):
    """Every head by one mask: who may see whom, by segment, order, and group of the position in its segment."""
    heads, kv_heads = q.shape[1], k.shape[1]
    still = heads // 2 if kv_heads == 1 else kv_heads // 2 * (heads // kv_heads)
    segment = torch.tensor([i for i, (a, b) in enumerate(itertools.pairwise(starts)) for _ in range(b - a)])
    position = torch.tensor([p for a, b in itertools.pairwise(starts) for p in range(b - a)])
    out = []
    for head in range(heads):
        numbers = position // group if head < still else (position + group - group // 2) // group
        seen = (segment[:, None] == segment) & (position[:, None] >= position) & (numbers[:, None] == numbers)
        own = head * kv_heads // heads
        scores = (q[:, head] @ k[:, own].T * scale).masked_fill(~seen, -torch.inf)
        out.append(scores.softmax(-1) @ v[:, own])
    return torch.stack(out, 1)


@pytest.mark.parametrize("group", [4, 5, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (9, 3), (2, 2)])
def test_it_is_attention_under_one_mask(heads, kv_heads, group):
    starts, generator = [0, 13, 14, 22], torch.Generator().manual_seed(0)
    q, k, v, back = (
        torch.randn(22, n, 8, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads, heads)
    )  # fmt: skip
    found = []
    for attend in (
        lambda *x: shifted_attention(*x, starts, group, Scores(0.3)),
        lambda *x: dense(*x, starts, group, 0.3),
    ):
        inputs = [one.clone().requires_grad_() for one in (q, k, v)]
        out = attend(*inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, back)])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_groups_end_where_their_segments_do():
    assert borders([0, 10, 12], 4, 4) == [0, 4, 8, 10, 12]
    assert borders([0, 10, 12], 4, 2) == [0, 2, 6, 10, 12]


def test_packed_rows_learn_as_each_alone_in_its_groups(decoder):
    def example(*ids):
        return Example(np.array(ids, np.int64), np.arange(len(ids)) >= len(ids) - 2)

    ask = range(30, 42)
    rows = [example(*ask, 50, 51, 52), example(*ask, 60, 61)]
    batch = pack(rows)
    assert batch.prefix
    whole = answers(decoder, batch).log_p.detach()
    attend_in_groups(decoder, 4)
    found = []
    for batches in ([batch], [pack([row]) for row in rows]):
        decoder.zero_grad()
        log_p = torch.cat([answers(decoder, one).log_p for one in batches])
        log_p.sum().backward()
        found.append([log_p.detach(), *(parameter.grad.clone() for parameter in decoder.parameters())])
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert float((found[0][0] - whole).abs().min()) > 0.01
    attend_in_groups(decoder, 64)
    torch.testing.assert_close(answers(decoder, batch).log_p.detach(), whole, atol=1e-3, rtol=1e-4)
    attend_in_groups(decoder, None)
    assert torch.equal(answers(decoder, batch).log_p, whole)


# -- the file -----------------------------------------------------------------------------------------------------


def test_peft_computes_the_same_outputs_and_gradients(base, decoder, tiny, transformers_model, tmp_path):
    written(decoder, base, tmp_path / "mine")
    theirs = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine", is_trainable=True).eval()
    found = theirs(input_ids=IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)
    hidden = decoder(IDS, torch.arange(len(IDS)), [0, len(IDS)])
    decoder.nll(hidden[:-1], IDS[1:]).mean().backward()
    found.loss.backward()
    gradients = {
        name.removeprefix(PREFIX).replace(".modules_to_save", "").replace(".default", "").removesuffix(".weight"): one
        for name, parameter in theirs.named_parameters()
        if (one := parameter.grad) is not None
    }
    ours = {
        name.replace(".delta", "").removesuffix(".weight"): parameter.grad
        for name, parameter in decoder.named_parameters()
    }
    assert set(ours) == set(gradients)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def save_pefts(tiny, transformers_model, folder, **changes):
    """PEFT's own LoRA with norms, its logits."""
    torch.manual_seed(0)
    wanted = {"modules_to_save": ["input_layernorm", "model.norm"], **changes}
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], init_lora_weights=False, **wanted)
    theirs = get_peft_model(transformers_model(tiny), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.7
    theirs.save_pretrained(folder)
    return theirs(IDS[None]).logits[0].detach()


def test_what_peft_saved_computes_the_same_here(base, tiny, transformers_model, tmp_path):
    theirs = save_pefts(tiny, transformers_model, tmp_path)
    decoder = build_decoder(base)
    before, adapter = decoder.logits(IDS), read_adapter(tmp_path, base.layers)
    attach(decoder, adapter)
    assert len(adapter.norms) == 3
    assert float((decoder.logits(IDS) - before).abs().max()) > 0.1
    torch.testing.assert_close(decoder.logits(IDS), theirs, atol=1e-4, rtol=1e-4)


# -- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):  # noqa: F811
    """The config of a whole run in groups of 8 tokens."""
    config = settings(
        tmp_path_factory.mktemp("runs") / "long", method="longlora", group_size=8, max_steps=2, eval_every=2
    )
    run_training(config)
    return config


def test_a_resumed_run_is_the_uninterrupted_one(trained):
    require_same_when_resumed(trained, 1)


def test_a_run_learns_in_groups_and_is_measured_on_everything(trained, tmp_path):
    """Groups longer than the longest row are none: the first step's loss is another, the one held out before is not."""
    run_training(trained.model_copy(update={"out": tmp_path / "whole", "group_size": 512, "max_steps": 2}))
    short, whole = (read_metrics(run_folder(out) / "metrics.jsonl") for out in (trained.out, tmp_path / "whole"))
    assert [(m.step, m.held_out_loss) for m in short[:1]] == [(0, whole[0].held_out_loss)]
    assert short[1].loss != whole[1].loss


def test_the_size_of_groups_is_a_quarter_of_the_longest_row(settings, tmp_path):  # noqa: F811
    config = settings(tmp_path / "a", method="longlora", max_length=64)
    assert group_of(config) == 16
    assert group_of(config.model_copy(update={"group_size": 10})) == 10


def test_groups_are_refused_where_nothing_uses_them(settings, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError) as e:
        where_of(settings(tmp_path / "a", method="lora", group_size=8))
    assert e.value.what == "group_size: nothing that --method lora could use"
