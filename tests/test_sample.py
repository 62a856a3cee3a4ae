"""What the adapter answers to fixed prompts while it is trained."""

from __future__ import annotations

import pytest
import torch

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.data.conversation import Message
from edgelora.data.encode import encode_prompt
from edgelora.errors import DataError
from edgelora.nn.generate import Until, generate
from edgelora.peft.inject import inject
from edgelora.progress import Sample
from edgelora.training.sample import Sampler

PROMPTS = ["Turn on the light", "Lock the door"]


@pytest.fixture
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def decoder(base):
    torch.set_num_threads(1)
    return build_decoder(base)


def asked(base, prompt, system=None):
    messages = [Message("user", prompt)] if system is None else [Message("system", system), Message("user", prompt)]
    return encode_prompt(messages, base.tokenizer, base.template)


@pytest.mark.parametrize("system", [None, "Be short."])
def test_samples_are_the_answers_to_chat_prompts(base, decoder, system):
    answers = generate(decoder, [asked(base, prompt, system) for prompt in PROMPTS], Until(6))
    samples = Sampler(PROMPTS, base, system, max_tokens=6)(decoder)
    assert samples == tuple(
        Sample(p, base.tokenizer.decode(a), ended=False) for p, a in zip(PROMPTS, answers, strict=True)
    )


def test_an_answer_ends_before_the_token_that_ends_generation(base, decoder, monkeypatch):
    answer = generate(decoder, [asked(base, PROMPTS[0])], Until(6))[0]
    monkeypatch.setattr(base.tokenizer, "eog_ids", (answer[3],))
    (sample,) = Sampler(PROMPTS[:1], base)(decoder)
    assert sample == Sample(PROMPTS[0], base.tokenizer.decode(answer[: answer.index(answer[3])]), ended=True)


def test_the_adapter_speaks(base, decoder):
    sampler = Sampler(PROMPTS, base, max_tokens=8)
    before = sampler(decoder)
    for parameter in inject(decoder, "lora", 4, 8.0, seed=0):
        torch.nn.init.normal_(parameter.data, std=0.3, generator=torch.Generator().manual_seed(1))
    assert sampler(decoder) != before


def test_a_base_without_a_chat_template_goes_on_with_the_text(make_tiny):
    base = open_base(make_tiny(template=None).path)
    decoder = build_decoder(base)
    answer = generate(decoder, [base.tokenizer.encode("light").ids], Until(5))[0]
    assert Sampler(["light"], base, max_tokens=5)(decoder)[0].text == base.tokenizer.decode(answer)


def test_prompts_without_room_for_an_answer_are_refused_together(make_tiny):
    base = open_base(make_tiny(template=None).path)
    with pytest.raises(DataError) as caught:
        Sampler(["fine", "", "on " * 600], base)
    assert caught.value.what == f"these samples cannot be answered: '', '{('on ' * 13)[:39]}…'"
    assert "512 tokens" in caught.value.why


@pytest.mark.real
def test_a_real_model_answers_and_ends(smollm):
    base = open_base(smollm)
    prompt = "What is the capital of France?"
    (sample,) = Sampler([prompt], base, max_tokens=24)(build_decoder(base))
    assert "Paris" in sample.text
    assert sample.ended
