"""Doors over the real base, SmolLM2-135M: what llama.cpp computes with the files is what torch does with the adapter.

Over its weights as F16 nothing is rounded but activations, to F16, and what a factor makes of a row, by 2⁻¹¹: the
limits of floats hold, a mean KL of 1e-4 and no other top (1e-6 to 2e-5 are found). Over the file as it is, Q4_1, and
over Q8_0 llama.cpp rounds activations to 8 bits, which costs the bare base 4e-3 already: the limits of such blocks
hold, which are wide. So nowhere may it be more than a tenth of what the adapter changes: a part that is left out, or
rows in another order, are as much as that. A LoRA, a soft prompt, an IA3 and the SVD are certified in
test_exit_plan.py, merges in test_quickstart.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from stirred import Stir

from converters.adapter_to_gguf import write_adapter_gguf
from converters.merge import Part
from converters.patch import LARGEST_ERROR, plan_patch, write_patched, write_rest
from converters.plan import QuantizeOptions
from converters.quantize import write_quantized
from converters.soft_prompt_to_gguf import write_soft_prompt_gguf
from converters.untie import write_untied
from edgelora.base.decoder import build_decoder
from edgelora.base.head import Head
from edgelora.base.model import Base, open_base
from edgelora.data.encode import Example
from edgelora.evaluate.fidelity import fidelity
from edgelora.evaluate.thresholds import limits_of
from edgelora.files.gguf import GGUFFile
from edgelora.files.soft_prompt import read_soft
from edgelora.nn.awake import last_place
from edgelora.peft.adapter import write_folder
from edgelora.peft.inject import inject
from edgelora.peft.methods import METHODS
from edgelora.peft.soft_prompt import SAVED, read_trained_prompt
from edgelora.peft.targets import Where
from edgelora.peft.virtual_settings import VirtualTokens
from edgelora.peft.virtual_tokens import begin_as, prompt_config, saved
from edgelora.pipeline.soft_states import soft_states
from edgelora.progress import silent
from runtime.binding import Context, Model
from runtime.prefix import logits_behind, prepare
from runtime.scorer import ScoringEngine

pytestmark = pytest.mark.real

TEXT = "The cat sat on the mat. In 1969, two people walked on the Moon for the first time; the third one stayed above."
AS_IT_IS = "Q4_1"
SELDOM = [pytest.param(quant, marks=pytest.mark.exhaustive) for quant in ("F16", "Q8_0")]
QUANTS = [AS_IT_IS, *SELDOM]
PATCHED = {"dora": 0.2, "ia3": 0.4, "bitfit": 0.2, "layernorm": 0.1}  # by how much each is stirred
ALWAYS = ("dora", "bitfit")  # over the file as it is; an IA3's is in test_exit_plan.py


@pytest.fixture(scope="module")
def real(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Base]]:
    """`real(quant)`: the base as it is, or of its weights another file."""
    folder = tmp_path_factory.mktemp("real")

    def make(quant: str) -> Base:
        path = smollm if quant == AS_IT_IS else folder / f"{quant}.gguf"
        if not path.exists():
            write_quantized(smollm, path, QuantizeOptions(quant))
        return open_base(path)

    yield make
    for path in folder.iterdir():
        path.unlink()  # pytest would keep 400 MB for three more runs


@pytest.fixture(autouse=True)
def _patched_bases_go(tmp_path: Path) -> Iterator[None]:
    yield
    for path in tmp_path.glob("*.gguf"):
        path.unlink()


def ids_of(base: Base) -> list[int]:
    ids: list[int] = base.tokenizer.encode(TEXT).ids
    return ids


def in_llama_cpp(base: Base, lora: Path | None = None) -> np.ndarray:
    """Its logits (T, V) of the text, with a LoRA or bare."""
    ids = ids_of(base)
    with ScoringEngine(base, n_ctx=128, threads=1) as engine:
        if lora is not None:
            engine.load_own("it", lora)
            engine.use({"it": 1.0})
        return engine.logits([ids], [list(range(len(ids)))])


def require_near(base: Base, live: np.ndarray, theirs: np.ndarray, bare: np.ndarray) -> None:
    """Logits (T, V) of torch with the adapter, and of llama.cpp with its files and without."""
    found = fidelity([(live, theirs)])
    kinds = {info.type for info in base.file.tensors.values() if len(info.shape) > 1}
    assert limits_of(kinds).faults(found) == []
    assert found.kl_mean < fidelity([(live, bare)]).kl_mean / 10


@pytest.mark.parametrize(
    ("method", "quant"),
    [
        *((method, AS_IT_IS) for method in ALWAYS),
        *(pytest.param(method, AS_IT_IS, marks=pytest.mark.exhaustive) for method in PATCHED if method not in ALWAYS),
        *(pytest.param(method, *one.values, marks=one.marks) for method in PATCHED for one in SELDOM),
    ],
)  # fmt: skip
def test_it_computes_the_same_over_a_patched_base(real, tmp_path, method, quant):
    base = real(quant)
    decoder, adapter = Stir(rank=8, alpha=16.0, by=PATCHED[method]).on(base, method)
    live = decoder.logits(torch.tensor(ids_of(base))).detach().numpy()
    plan, rest = plan_patch(base, adapter), tmp_path / "rest.gguf"
    assert {patch.how for patch in plan.patches.values()} <= {"scaled"}
    assert plan.error <= LARGEST_ERROR
    write_patched(tmp_path / "patched.gguf", base, plan, Part(adapter, 1.0, "0" * 64, "mine"))
    if plan.rest:
        write_rest(rest, base, plan, "mine", None)
    assert rest.exists() == (method == "dora")
    patched = open_base(tmp_path / "patched.gguf")
    require_near(base, live, in_llama_cpp(patched, rest if plan.rest else None), in_llama_cpp(base))


def prefix_folder(base: Base, folder: Path) -> Path:
    """Keys and values of a text, as prefix tuning begins, and a little beside them."""
    row, virtual, decoder = METHODS["prefix_tuning"], VirtualTokens(7), build_decoder(base)
    inject(decoder, row.name, 1, 1.0, seed=0, targets=Where(virtual=virtual))
    begin_as(decoder, base.tokenizer.encode("Answer as a pirate would:").ids)
    values = saved(decoder)
    values += np.random.default_rng(0).normal(0, 0.05, values.shape).astype(np.float32)
    write_folder(folder, prompt_config(decoder.config, row, virtual, str(base.path)), {SAVED: values}, None)
    return folder


@pytest.mark.parametrize("quant", QUANTS)
def test_it_computes_the_same_behind_a_prefix(real, tmp_path, quant):
    base = real(quant)
    folder, ids = prefix_folder(base, tmp_path / "prefix"), np.array(ids_of(base))
    example = Example(ids, np.arange(len(ids)) > 0)
    prompts = np.stack([np.roll(ids, i)[:6] for i in range(8)]).astype(np.int32)
    states = soft_states(base.path, folder, [example], prompts, silent)
    trained = read_trained_prompt(folder, base.config)
    write_soft_prompt_gguf(tmp_path / "it.gguf", trained, base, "it", states.reference)
    content = read_soft(GGUFFile(tmp_path / "it.gguf"), base.architecture.gguf_name, base.config, base.context)
    with (
        closing(Model(base.path)) as model,
        closing(Context(model, n_ctx=128, n_sequences=1, threads=1, exact=True)) as context,
    ):
        head = prepare(content, context, "it")
        places = range(len(ids) - 1)
        theirs, bare = (logits_behind(one, context, ids.tolist(), places).copy() for one in (head, None))
    require_near(base, Head(base).logits(states.behind), theirs, bare)


@pytest.mark.parametrize("quant", QUANTS)
def test_an_alora_wakes_where_it_does_in_torch(real, tmp_path, quant):
    base = real(quant)
    ids, at = ids_of(base), 8
    invoked = tuple(ids[at : at + 2])
    assert last_place(invoked, ids) == at
    decoder, adapter = Stir(rank=8, alpha=16.0, by=0.2).on(base, "alora", Where(alora_invocation_tokens=invoked))
    live, bare = decoder.logits(torch.tensor(ids)).numpy(), in_llama_cpp(base)
    write_adapter_gguf(tmp_path / "it.gguf", adapter, base, "it")
    theirs = in_llama_cpp(base, tmp_path / "it.gguf")
    require_near(base, live, theirs, bare)
    require_near(base, live[at:], theirs[at:], bare[at:])


@pytest.mark.parametrize("quant", QUANTS)
def test_new_rows_of_tokens_leave_as_a_lora_over_the_untied_base(real, tmp_path, quant):
    write_untied(tmp_path / "untied.gguf", real(quant))
    base = open_base(tmp_path / "untied.gguf")
    where = Where(token_indices=tuple(sorted(set(ids_of(base)[3:9]))))
    decoder, adapter = Stir(rank=1, alpha=1.0, by=0.2).on(base, "token_rows", where)
    write_adapter_gguf(tmp_path / "it.gguf", adapter, base, "it")
    live = decoder.logits(torch.tensor(ids_of(base))).numpy()
    require_near(base, live, in_llama_cpp(base, tmp_path / "it.gguf"), in_llama_cpp(base))
