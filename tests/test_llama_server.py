"""What edgelora writes answers in llama-server as it does in torch: a merged model, and an adapter at any scale.

The server is the one inside the package xllamacpp, another build of llama.cpp than ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import make_adapter
from test_merge import saved, write

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.data.conversation import Message
from edgelora.evaluate.fidelity import log_softmax
from edgelora.peft.blend import blend

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="the package xllamacpp is not installed")

SERVE = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.port = sys.argv[1], 256, 1, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.use_jinja, params.fit_params = True, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as torch; else keys lose 13 bits
params.cache_ram_mib = 0  # its store of old prompts forgets at which scale an adapter was: 0.5 would be given 1.0's
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if len(sys.argv) > 2:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
server = xllamacpp.Server(params)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""
PROMPTS = (list(range(5, 45)), [3, 4, 9, 9, 30, 31, 32])

Ask = Callable[..., Any]


@contextmanager
def serving(model: Path, *adapter: Path) -> Iterator[Ask]:
    """`ask(path, **fields)` of a server over these files, which ends with the block."""
    words = [sys.executable, "-c", SERVE, str(model), *map(str, adapter)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        address = next(line for line in process.stdout if line.startswith("at ")).split()[1]

        def ask(path: str, **fields: Any) -> Any:
            request = urllib.request.Request(
                f"{address}/{path}", json.dumps(fields).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        try:
            yield ask
        finally:
            process.kill()


def likeliest(ask: Ask, prompt: Sequence[int], **fields: Any) -> dict[int, float]:
    """log p of the ten tokens that the server holds for the likeliest next ones."""
    answer = ask("completion", prompt=list(prompt), n_predict=1, n_probs=10, temperature=0.0, **fields)
    return {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}


def in_torch(base, prompt: Sequence[int], *adapters) -> np.ndarray:
    decoder = build_decoder(base)
    blend(decoder, adapters)
    return log_softmax(decoder.logits(torch.tensor(prompt)).numpy())[-1]


def assert_same(found: dict[int, float], wanted: np.ndarray) -> None:
    assert list(found) == np.argsort(-wanted)[:10].tolist()
    np.testing.assert_allclose(list(found.values()), [wanted[token] for token in found], atol=2e-4)


def test_a_merged_model_answers_as_torch_does(tiny, tmp_path):
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    write(tiny.path, [(saved(tmp_path / "mine", adapter), 1.0)], tmp_path / "merged.gguf", "F32")
    with serving(tmp_path / "merged.gguf") as ask:
        for prompt in PROMPTS:
            assert_same(likeliest(ask, prompt), in_torch(base, prompt, (adapter, 1.0)))


def test_an_adapter_answers_as_torch_does_at_any_scale(tiny, tmp_path):
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    write_adapter_gguf(tmp_path / "mine.gguf", adapter, base, "mine", "F32")
    with serving(tiny.path, tmp_path / "mine.gguf") as ask:
        for scale in (1.0, 0.5, 0.0):
            for prompt in PROMPTS:
                found = likeliest(ask, prompt, lora=[{"id": 0, "scale": scale}])
                assert_same(found, in_torch(base, prompt, (adapter, scale)))


def test_a_conversation_is_rendered_and_read_as_edgelora_does(tiny):
    base = open_base(tiny.path)
    said = [Message("user", "turn the lights on"), Message("assistant", "on"), Message("user", "off <|im_end|>")]
    messages = [{"role": m.role, "content": m.content} for m in said]
    with serving(tiny.path) as ask:
        rendered = ask("apply-template", messages=messages)["prompt"]
        assert rendered == base.template.render(said, generation_prompt=True).text
        text = "The old harbour: 1,234 boats — déjà vu 🙂"
        assert ask("tokenize", content=text)["tokens"] == base.tokenizer.encode(text).ids
