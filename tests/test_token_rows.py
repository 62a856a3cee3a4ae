"""Trained token rows against PEFT, the gradient of a head that has some, and merged into every place they stand in."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Type
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from resumed import require_same_when_resumed
from same_tokens import IDS
from test_resume import data, settings  # noqa: F401

from converters.merge import Part
from converters.merge_to_hf import write_merged_folder
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import Dense
from edgelora.errors import AdapterError, ConfigError
from edgelora.nn.loss import LinearCrossEntropy, Target
from edgelora.peft.adapter import CONFIG, PREFIX, Adapter, read_adapter, write_adapter
from edgelora.peft.blend import blend
from edgelora.peft.inject import adapter_config, attach, collect, inject, without_adapter
from edgelora.peft.targets import Where
from edgelora.pipeline.merge import merge
from edgelora.training.adapter_footprint import adapter_numbers
from edgelora.training.base_footprint import Model
from edgelora.training.run import run_training
from edgelora.training.trained_tokens import tokens_of

# PEFT asks transformers for what it will rename
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.*:UserWarning"),  # PEFT ties them itself
    pytest.mark.usefixtures("own_home"),
]

TOKENS = (3, 77, 500)
WHERE = Where(token_indices=TOKENS)
IDS = IDS.clone()
IDS[[2, 9, 10, 20]] = torch.tensor([77, 500, 77, 3])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, make_tiny):
    return make_tiny(Type.F32, tied=request.param)


@pytest.fixture(scope="module")
def base(model):
    return open_base(model.path)


def trained(base):
    """A decoder whose rows have learned something."""
    decoder = build_decoder(base)
    inject(decoder, "token_rows", 1, 1.0, seed=0, targets=WHERE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return decoder


def written(decoder, base, folder):
    adapter = Adapter(adapter_config(decoder, "token_rows", 1, 1.0, str(base.path), WHERE), collect(decoder))
    write_adapter(folder, adapter)
    return adapter


def read(folder, base):
    return read_adapter(folder, base.layers)


def test_it_begins_as_the_base_and_trains_these_rows_alone(base):
    decoder = build_decoder(base)
    before = decoder.logits(IDS)
    parameters = inject(decoder, "token_rows", 1, 1.0, seed=0, targets=WHERE)
    torch.testing.assert_close(decoder.logits(IDS), before, atol=1e-5, rtol=1e-5)
    assert [tuple(one.shape) for one in parameters] == [(3, 256)] * len(base.vocabularies)


def test_peft_computes_the_same_outputs_and_gradients(base, model, transformers_model, tmp_path):
    decoder = trained(base)
    written(decoder, base, tmp_path / "mine")
    theirs = PeftModel.from_pretrained(transformers_model(model), tmp_path / "mine", is_trainable=True).eval()
    found = theirs(input_ids=IDS[None], labels=IDS[None])
    live = decoder.logits(IDS)
    torch.testing.assert_close(live, found.logits[0].detach(), atol=1e-4, rtol=1e-4)
    assert float((live - build_decoder(base).logits(IDS)).abs().max()) > 0.5
    hidden = decoder(IDS, torch.arange(len(IDS)), [0, len(IDS)])
    decoder.nll(hidden[:-1], IDS[1:]).mean().backward()
    found.loss.backward()
    wanted = {
        name.removeprefix(PREFIX).replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    ours = {name.replace(".delta", ""): parameter.grad for name, parameter in decoder.named_parameters()}
    assert set(ours) == set(wanted)
    for name, gradient in ours.items():
        assert gradient.any(-1).all()
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-3, msg=name)


def test_what_peft_saved_computes_the_same_here(base, model, transformers_model, tmp_path):
    config = TrainableTokensConfig(token_indices=[500, 3], target_modules=[*base.vocabularies])
    theirs = get_peft_model(transformers_model(model), config).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    decoder = build_decoder(base)
    attach(decoder, read(tmp_path, base))
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0], atol=1e-4, rtol=1e-4)
    with without_adapter(decoder):
        assert torch.equal(decoder.logits(IDS), build_decoder(base).logits(IDS))


@pytest.mark.parametrize("how", [{}, {"softcap": 3.0}, {"smoothing": 0.1}], ids=str)
def test_the_gradient_is_that_of_a_head_with_these_rows(how):
    def draw(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    class Exact(Dense):
        def rows(self, first, last, _=None):
            return self.values[first:last].to(torch.float64)

    ids, labels, weight = torch.tensor([1, 4]), torch.tensor([4, 0, 1, 1]), draw(6, 5, seed=0)
    target = Target(**how, ids=ids)

    def function(x, rows):
        return LinearCrossEntropy.apply(x, Exact(weight), labels, target, rows)

    x, rows = draw(4, 5, seed=1), draw(2, 5, seed=2)
    z = x @ weight.index_copy(0, ids, rows).T
    z = z if "softcap" not in how else 3.0 * (z / 3.0).tanh()
    wanted = torch.nn.functional.cross_entropy(z, labels, reduction="none", label_smoothing=how.get("smoothing", 0.0))
    torch.testing.assert_close(function(x, rows), wanted)
    assert torch.autograd.gradcheck(function, [x.requires_grad_(), rows.requires_grad_()])


# -- its way out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "atol"), [("F16", 2e-2), ("F32", 1e-5)])
def test_merged_and_certified_it_computes_the_same(base, tmp_path, quant, atol):
    decoder = trained(base)
    written(decoder, base, tmp_path / "mine")
    merge(base.path, [(tmp_path / "mine", 1.0)], tmp_path / "merged.gguf", quant=quant, allow_unverified=True)
    merged = open_base(tmp_path / "merged.gguf")
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings
    torch.testing.assert_close(build_decoder(merged).logits(IDS), decoder.logits(IDS), atol=atol, rtol=0)


def test_it_is_merged_into_a_folder(model, transformers_model, write_tokenizer, vocabulary, tmp_path):
    transformers_model(model).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", vocabulary, None)
    base = open_base(tmp_path / "base")
    decoder = trained(base)
    written(decoder, base, tmp_path / "mine")
    (tmp_path / "merged").mkdir()
    write_merged_folder(tmp_path / "merged", base, [Part(read(tmp_path / "mine", base), 1.0, "0" * 64, "mine")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0], atol=1e-4, rtol=1e-5)


def test_two_at_their_scales_are_what_their_merged_model_computes(base, tmp_path):
    adapter = written(trained(base), base, tmp_path / "mine")
    other = written(trained(base), base, tmp_path / "other")
    parts = [(tmp_path / "mine", 0.5), (tmp_path / "other", 0.25)]
    merge(base.path, parts, tmp_path / "merged.gguf", quant="F32", allow_unverified=True)
    decoder = build_decoder(base)
    blend(decoder, [(adapter, 0.5), (other, 0.25)])
    torch.testing.assert_close(
        build_decoder(open_base(tmp_path / "merged.gguf")).logits(IDS), decoder.logits(IDS), atol=1e-4, rtol=1e-4
    )


def test_rows_of_a_head_that_a_base_does_not_have_are_refused(make_tiny, tmp_path):
    tied, untied = (open_base(make_tiny(Type.F32, tied=one).path) for one in (True, False))
    written(trained(untied), untied, tmp_path / "mine")
    with pytest.raises(AdapterError, match="this base has one matrix for both"):
        read(tmp_path / "mine", tied)


def test_who_knows_nothing_of_rows_refuses_them(base, tmp_path):
    written(trained(base), base, tmp_path / "mine")
    with pytest.raises(AdapterError, match="its tokens have no rows that are read here"):
        read_adapter(tmp_path / "mine", base.layers, may_have_rows=False)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([3, 77], "is (3, 256), expected (2, 256)"),
        ([3, 77, 512], "it has the id 512, and the base has 512 tokens"),
        ([3, 77, 77], "names a token twice"),
        (None, "token_indices is None"),
        ([3, 77, -1], "expected token ids"),
    ],
)
def test_a_damaged_one_is_refused(base, tmp_path, ids, said):
    written(trained(base), base, tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / CONFIG).read_text())
    (tmp_path / "mine" / CONFIG).write_text(json.dumps(config | {"token_indices": ids}))
    with pytest.raises(AdapterError) as e:
        read(tmp_path / "mine", base)
    assert said in e.value.what


# -- a run --------------------------------------------------------------------------------------------------------


def test_tokens_are_named_by_text_or_id(settings, tiny, tmp_path):  # noqa: F811
    base = open_base(tiny.path)
    config = settings(tmp_path / "a", method="token_rows", train_tokens=("<|im_end|>", "77", "<|im_start|>", "1"))
    settled = tokens_of(config, base)
    assert settled.train_tokens == ("1", "2", "77")
    assert adapter_numbers(Model.of(base), settled) == 3 * 256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_tokens": ("512",)}, "the id 512 is no token"),
        ({}, "no token is named"),
        ({"train_tokens": ("light of day",)}, "light of day is"),
        ({"method": "lora", "train_tokens": ("1",)}, "nothing that --method lora could use"),
    ],
)
def test_what_is_no_token_is_refused(settings, tiny, tmp_path, changes, said):  # noqa: F811
    with pytest.raises(ConfigError) as e:
        tokens_of(settings(tmp_path / "a", **{"method": "token_rows", **changes}), open_base(tiny.path))
    assert said in e.value.what


def test_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path):  # noqa: F811
    config = settings(tmp_path / "a", method="token_rows", train_tokens=("<|im_start|>", "77"), max_steps=2)
    run_training(config)
    require_same_when_resumed(config, 1)
    base = open_base(config.base)
    (ids, rows), own = read(config.out, base).token_rows["model.embed_tokens"], build_decoder(base).embedding
    assert ids.tolist() == [1, 77]
    moved = np.abs(rows - own.gather(torch.from_numpy(ids)).numpy()).max(-1)
    assert (moved > 0).all()
