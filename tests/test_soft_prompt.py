"""Soft prompts and prefixes as adapters like any other: PEFT's files, certified, loaded, and never mixed up."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import closing
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType
from live_walk import Walk, ask
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.numpy import save_file
from test_architectures import LENGTH, RUNNABLE, converted, family  # noqa: F401
from test_export import make_adapter
from test_preflight import write_foreign

from converters.adapter_to_gguf import write_adapter_gguf
from converters.soft_prompt_to_gguf import write_soft_prompt_gguf
from edgelora.base import ggml
from edgelora.base.head import Head
from edgelora.base.model import open_base
from edgelora.data.encode import Example
from edgelora.errors import AdapterError, EngineError, FileFormatError
from edgelora.files.adapter_check import INVOCATION_KEY
from edgelora.files.contract import CERTIFICATE_KEY, FILE_NAME
from edgelora.files.gguf import GGUFFile
from edgelora.files.soft_prompt import _array, read_soft, require_sound
from edgelora.peft.adapter import CONFIG as SETTINGS
from edgelora.peft.adapter import TENSORS
from edgelora.peft.soft_prompt import TrainedPrompt, read_trained_prompt
from edgelora.pipeline.export import ExportOptions, export
from edgelora.pipeline.inspect_adapter import gguf_adapter
from edgelora.pipeline.soft_states import soft_states
from edgelora.progress import silent
from runtime.binding import Context, Entry, Lora, Model
from runtime.engine import Engine
from runtime.prefix import logits_behind, prepare
from runtime.service import EngineConfig, Request, Sampling
from runtime.store import Store

# PEFT asks transformers for what it will rename
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("own_home"),
]

CONFIG = EngineConfig(context=256, chunk=8, threads=1)
LOGPROBS = Sampling(logprobs=0)
IDS = list(range(5, 30))
N = 11  # longer than a chunk, and no multiple of it
KINDS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=32),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    "projected prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=32
    ),
}


@pytest.fixture(scope="module")
def made(tiny, transformers_model, tmp_path_factory):
    """`made(kind, seed)`: (PEFT's folder, the exported file, PEFT's logits (T, V) for IDS)."""
    known = {}

    def make(kind, seed=0):
        if (kind, seed) not in known:
            folder = tmp_path_factory.mktemp("soft")
            torch.manual_seed(seed)
            model = get_peft_model(transformers_model(tiny), copy.copy(KINDS[kind])).eval()
            with torch.no_grad():
                for parameter in model.prompt_encoder.parameters():
                    parameter.normal_(0, 0.5 if "prefix" in kind else 0.1)
                theirs = model(torch.tensor([IDS])).logits[0, -len(IDS) :].numpy()
            model.save_pretrained(folder / "peft")
            export(tiny.path, folder / "peft", folder / f"{kind}.gguf", ExportOptions(allow_unverified=True))
            known[kind, seed] = folder / "peft", folder / f"{kind}.gguf", theirs
        return known[kind, seed]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_peft_computes(tiny, made, kind):
    _, path, theirs = made(kind)
    base = open_base(tiny.path)
    content = read_soft(GGUFFile(path), "llama", base.config, base.context)
    model = Model(tiny.path)
    context = Context(model, n_ctx=256, n_sequences=1, threads=1, exact=True)
    head = prepare(content, context, "it")
    found = logits_behind(head, context, IDS, range(len(IDS)))
    bare = logits_behind(None, context, IDS, range(len(IDS)))
    context.close()
    model.close()
    np.testing.assert_allclose(found, theirs, atol=1e-3, rtol=0)
    assert np.abs(bare - theirs).max() > 0.3


@pytest.mark.parametrize(
    "settings",
    [{}, {"flash_attention": "off"}, {"kv_type": "f32", "flash_attention": "off"}, {"conversations": 3}, {"chunk": 64}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_engine_answers_as_peft_generates(tiny, made, kind, settings):
    _, path, theirs = made(kind)
    with Engine.open(tiny.path, replace(CONFIG, **settings)) as engine:
        info = engine.load("it", path, allow_unverified=True)
        assert (info.name, engine.stats().adapter_bytes) == ("it", path.stat().st_size)
        for _ in range(2):
            for end in range(1, len(IDS) + 1):
                stream = engine.generate(Request(tuple(IDS[:end]), {"it": 1.0}, max_tokens=1, sampling=LOGPROBS))
                (piece,) = stream
                row = theirs[end - 1].astype(np.float64)
                expected = row.max() - np.log(np.exp(row - row.max()).sum()) - row.max()
                assert piece.tokens[0] == int(row.argmax())
                assert piece.logprobs[0].logprob == pytest.approx(expected, abs=5e-3)
        assert stream.usage.reused_tokens == (N + len(IDS) - 1) // engine._limits.chunk * engine._limits.chunk
        assert stream.usage.prompt_tokens == N + len(IDS)


def test_over_the_real_model_the_embeddings_of_a_text_are_that_text(smollm, tmp_path):
    base = open_base(smollm)
    text = base.tokenizer.encode("A pirate's guide to the sea: the first rule of the ship is that")
    ids, n = text.ids, CONFIG.chunk  # evaluated in the same shapes: a quantized base gives the same bits
    rows, kind, columns = base.tensors.matrix("model.embed_tokens.weight")
    prompt = TrainedPrompt(embeddings=ggml.dequantize(rows[ids[:n]], kind, columns))
    write_soft_prompt_gguf(tmp_path / "it.gguf", prompt, base, "it")
    with Engine.open(base, CONFIG) as engine:
        engine.load("it", tmp_path / "it.gguf", allow_unverified=True)
        sampling = Sampling(logprobs=0)
        answers = [
            [(piece.tokens, piece.logprobs) for piece in engine.generate(Request(tuple(asked), on, sampling, 16))]
            for asked, on in ((ids, {}), (ids[n:], {"it": 1.0}), (ids[n:], {}))
        ]
    assert answers[0] == answers[1] != answers[2]


@pytest.fixture(scope="module")
def files(tiny, made, tmp_path_factory):
    """Two LoRAs, two soft prompts and two prefixes."""
    folder, base = tmp_path_factory.mktemp("loras"), open_base(tiny.path)
    for seed in range(2):
        write_adapter_gguf(folder / f"{seed}.gguf", make_adapter(base, seed=seed, strength=0.5), base, str(seed))
    loras = {f"lora-{seed}": folder / f"{seed}.gguf" for seed in range(2)}
    return loras | {f"{kind}-{seed}": made(kind, seed)[1] for kind in ("prompt", "prefix") for seed in range(2)}


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_it_is_kept_under_a_name_and_inspected_as_an_adapter(made, tmp_path, kind):
    _, path, _ = made(kind)
    store = Store(tmp_path)
    stored = store.add("mine", path)
    assert stored.about.method == {"prompt": "soft_prompt", "prefix": "prefix"}[kind]
    assert store.resolve("mine").read_bytes() == path.read_bytes()
    facts = gguf_adapter(GGUFFile(path))
    assert facts.faults == []
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FileFormatError):
        store.add("broken", broken)


class SoftWalk(Walk):
    """A walk in which one soft prompt or prefix may be on, and sets that ask for more are refused."""

    def __post_init__(self):
        super().__post_init__()
        heads, loras = ([n for n in sorted(self.files) if ("lora" in n) == is_lora] for is_lora in (False, True))
        self._sets += [
            {head: 1.0, lora: scale} for head in heads for lora, scale in zip(loras, (1.0, -0.5), strict=True)
        ]
        self.refused = 0

    def _step(self, engine, content):
        """(The set is drawn here as the walk will draw it.)"""
        state = self._draw.getstate()
        chosen = self._draw.choice(self._sets)
        self._draw.setstate(state)
        scales = {}
        for name, scale in chosen.items():
            scales[content[name]] = scales.get(content[name], 0) + scale
        heads = [scale for file, scale in scales.items() if "lora" not in file and scale]
        if heads in ([], [1.0]):
            return super()._step(engine, content)
        self._draw.choice(self._sets)
        self.refused += 1
        with pytest.raises(EngineError, match="a soft prompt or prefix at the scale"):
            engine.generate(Request((5, 6, 7), chosen))
        return True


@pytest.mark.parametrize("settings", [{}, {"hot_adapters": 2, "conversations": 2, "draft_tokens": 3}], ids=str)
def test_whatever_was_on_before_an_answer_is_that_of_a_cold_run(tiny, files, tmp_path, monkeypatch, settings):
    load = Engine.load
    monkeypatch.setattr(Engine, "load", lambda self, name, path: load(self, name, path, allow_unverified=True))
    config = replace(CONFIG, snapshot_bytes=200_000, snapshot_folder=tmp_path, **settings)
    walk = SoftWalk(open_base(tiny.path), files, config)
    assert all(walk.run(120))
    assert walk.refused > 5
    assert walk.reused > 120


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_an_alora_wakes_where_it_is_invoked_behind_it(tiny, made, tmp_path, kind):
    prompt, at = [*IDS[:14], 7, 8, *IDS[16:]], 14
    draw = np.random.default_rng(0)
    halves = {"lora_a": draw.normal(0, 0.3, (4, 256)), "lora_b": draw.normal(0, 0.5, (256, 4))}
    alora = write_foreign(
        tmp_path / "alora.gguf",
        {
            f"blk.{i}.attn_q.weight.{half}": values.astype(np.float32)
            for i in range(2)
            for half, values in halves.items()
        },
        **{INVOCATION_KEY: ([7, 8], GGUFValueType.ARRAY, GGUFValueType.UINT32)},
    )
    with Engine.open(tiny.path, CONFIG) as engine:
        for name, path in (("it", made(kind)[1]), ("alora", alora)):
            engine.load(name, path, allow_unverified=True)
        stream = engine.generate(Request(tuple(prompt), {"it": 1.0, "alora": 1.0}, max_tokens=1, sampling=LOGPROBS))
        (piece,) = stream
        head = engine._adapters.head(engine._adapters.key_of({"it": 1.0}))
    with closing(Model(tiny.path)) as model, closing(Context(model, n_ctx=256, n_sequences=1, threads=1)) as context:
        rows = {}
        for wakes in (0, at, len(prompt)):
            context.clear()
            context.set_adapters([])
            head.put(context, 0, 0, N)
            for i, token in enumerate(prompt):
                if i == wakes:
                    context.set_adapters([(Lora(model, alora), 1.0)])
                row = context.decode([Entry(token, N + i, 0, True)])[0].copy()
            rows[wakes] = row.max() - np.log(np.exp(row - row.max()).sum()) - row.max()
        context.set_adapters([])
    assert piece.logprobs[0].logprob == pytest.approx(rows[at], abs=1e-3)
    assert min(abs(rows[at] - rows[0]), abs(rows[at] - rows[len(prompt)])) > 0.01


def test_the_walk_notices_when_a_content_is_left_out_of_the_key(tiny, files, monkeypatch):
    load = Engine.load
    monkeypatch.setattr(Engine, "load", lambda self, name, path: load(self, name, path, allow_unverified=True))
    monkeypatch.setattr("runtime.states.named", lambda _: b"")
    assert not all(SoftWalk(open_base(tiny.path), files, CONFIG).run(60))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K", "F16"])
def test_it_goes_over_any_quantization_of_its_base(made, make_tiny, tmp_path, kind, quant):
    """Certified over that file, and one made over the F32 file passes its test over it as well."""
    folder, path, _ = made(kind)
    base = make_tiny(GGMLQuantizationType[quant]).path
    assert export(base, folder, tmp_path / "it.gguf", ExportOptions(allow_unverified=True)).passed
    with Engine.open(base, CONFIG) as engine:
        for name, file in (("own", tmp_path / "it.gguf"), ("other", path)):
            engine.load(name, file, allow_unverified=True)
        assert ask(engine, IDS, {"own": 1.0}) == ask(engine, IDS, {"other": 1.0})


def contract_of(base):
    return make_adapter(base).contract


def test_its_contract_is_held_to_like_any_adapters(tiny, make_tiny, made, tmp_path):
    folder, path, _ = made("prompt")
    with Engine.open(tiny.path, CONFIG) as engine, pytest.raises(AdapterError, match="does not say which base"):
        engine.load("it", path)
    with pytest.raises(AdapterError, match="does not say which base"):
        export(tiny.path, folder, tmp_path / "it.gguf")
    own = shutil.copytree(folder, tmp_path / "own")
    (own / FILE_NAME).write_text(contract_of(open_base(tiny.path)).model_dump_json())
    certificate = export(tiny.path, own, tmp_path / "it.gguf")
    inside = json.loads(GGUFFile(tmp_path / "it.gguf").get(CERTIFICATE_KEY, str))
    assert inside == certificate.as_dict() == json.loads((own / FILE_NAME).read_text())["certificate"]
    with Engine.open(tiny.path, CONFIG) as engine:
        engine.load("it", tmp_path / "it.gguf")
    other = make_tiny(seed=7).path
    with pytest.raises(AdapterError, match="does not belong to"):
        export(other, own, tmp_path / "other.gguf")
    with Engine.open(other, CONFIG) as engine, pytest.raises(AdapterError, match="does not belong to"):
        engine.load("it", tmp_path / "it.gguf")


def tensors_of(path):
    file = GGUFFile(path)
    return {name: _array(file, name) for name in file.tensors}


def write(path, tensors, kind="prefix", arch="llama"):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def damaged(tensors, **changes):
    found = {**tensors, **{name.replace("__", "."): values for name, values in changes.items()}}
    return {name: values for name, values in found.items() if values is not None}


PREFIX_FAULTS = {
    "blk.1.prefix_v is missing": {"blk__1__prefix_v": None},
    r"blk.0.prefix_k is F32 \(3, 2, 64\)|blk.1.prefix_k is F32": {"blk__0__prefix_k": np.zeros((3, 2, 64), np.float32)},
    "blk.1.prefix_k is F32": {"blk__1__prefix_k": np.zeros((N, 4, 32), np.float32)},
    "blk.1.prefix_k is F16": {"blk__1__prefix_k": np.zeros((N, 2, 64), np.float16)},
    "blk.2.prefix_k has no place": {"blk__2__prefix_k": np.zeros((N, 2, 64), np.float32)},
    "NaN or infinite": {"blk__1__prefix_v": np.full((N, 2, 64), np.nan, np.float32)},
    "it is 600 positions long": {"blk__0__prefix_k": np.zeros((600, 2, 64), np.float32)},
    "it is 0 positions long": {"blk__0__prefix_k": None},
    "ids that the base has not": {"reference__tokens": np.full((8, 3), 512, np.int32)},
    "reference.tokens is I32": {"reference__tokens": np.zeros((8, 17), np.int32)},
    "reference.tokens is F32": {"reference__tokens": np.zeros((8, 3), np.float32)},
    "reference.logits is F32": {"reference__logits": np.zeros((8, 511), np.float32)},
    "does not do here what it was trained to do": {"blk__1__prefix_v": np.ones((N, 2, 64), np.float32)},
    "too large for the cache": {"blk__1__prefix_v": np.full((N, 2, 64), 1e6, np.float32)},
}


@pytest.mark.parametrize("fault", PREFIX_FAULTS)
def test_a_damaged_prefix_is_refused(tiny, made, tmp_path, fault):
    path = write(tmp_path / "it.gguf", damaged(tensors_of(made("prefix")[1]), **PREFIX_FAULTS[fault]))
    with Engine.open(tiny.path, CONFIG) as engine:
        with pytest.raises(AdapterError, match=fault):
            engine.load("it", path, allow_unverified=True)
        assert not engine.adapters
        assert len(ask(engine, IDS, {})) == 6


SOFT_FAULTS = {
    "expected F32": np.zeros((4, 255), np.float32),
    "it is 512 positions long": np.zeros((512, 256), np.float32),
    "NaN or infinite": np.full((4, 256), np.inf, np.float32),
}


@pytest.mark.parametrize("fault", SOFT_FAULTS)
def test_a_damaged_soft_prompt_is_refused(tiny, tmp_path, fault):
    path = write(tmp_path / "it.gguf", {"prompt.embeddings": SOFT_FAULTS[fault]}, "soft_prompt")
    with Engine.open(tiny.path, CONFIG) as engine, pytest.raises(AdapterError, match=fault):
        engine.load("it", path, allow_unverified=True)


def test_one_behind_which_the_model_answers_no_numbers_is_refused(tiny, made, monkeypatch):
    evaluate = Context.evaluate
    monkeypatch.setattr(Context, "evaluate", lambda self, rows, *where: evaluate(self, rows * np.nan, *where))
    with Engine.open(tiny.path, CONFIG) as engine, pytest.raises(AdapterError, match="not finite numbers"):
        engine.load("it", made("prompt")[1], allow_unverified=True)


def test_one_of_another_family_and_a_cut_file_are_refused(tiny, made, tmp_path):
    alien = write(tmp_path / "a.gguf", tensors_of(made("prefix")[1]), arch="qwen2")
    (tmp_path / "b.gguf").write_bytes(made("prefix")[1].read_bytes()[:-40])
    with Engine.open(tiny.path, CONFIG) as engine:
        with pytest.raises(AdapterError, match=r"general\.architecture is 'qwen2', expected 'llama'"):
            engine.load("it", alien, allow_unverified=True)
        with pytest.raises(FileFormatError, match="cut short"):
            engine.load("it", tmp_path / "b.gguf", allow_unverified=True)


def test_llama_cpp_itself_refuses_such_a_file(tiny, made):
    model = Model(tiny.path)
    with pytest.raises(EngineError, match="cannot load this adapter"):
        Lora(model, made("prompt")[1])
    model.close()


def test_where_llama_cpp_rotates_keys_a_prefix_is_refused(tiny, made):
    with Engine.open(tiny.path, replace(CONFIG, kv_type="q8_0", flash_attention="on")) as engine:
        engine.load("prompt", made("prompt")[1], allow_unverified=True)
        with pytest.raises(EngineError) as error:
            engine.load("prefix", made("prefix")[1], allow_unverified=True)
    assert str(error.value).splitlines() == [
        "a prefix over quantized keys and values",
        "  why: llama.cpp rotates what it quantizes, and a prefix is put there as it is",
        "  fix: open the base with keys and values in f16 or f32",
    ]


@pytest.mark.parametrize("at", [0, 8, 12, 16, 20, -1], ids=str)
def test_a_state_of_another_layout_is_refused(tiny, made, monkeypatch, at):
    """A field that is not what it was: magic, number of streams, cells, a position, its sequences; one byte more."""
    save = Context.save

    def other(self, sequence):
        state = save(self, sequence)
        if at < 0:
            return np.append(state, np.uint8(0))
        state[at] ^= 3
        return state

    monkeypatch.setattr(Context, "save", other)
    with (
        Engine.open(tiny.path, CONFIG) as engine,
        pytest.raises(EngineError, match="keeps its keys and values in a way that is not known here"),
    ):
        engine.load("it", made("prefix")[1], allow_unverified=True)


def test_there_must_be_room_for_a_prompt_behind_it(tiny, made):
    with Engine.open(tiny.path, replace(CONFIG, context=N + len(IDS))) as engine:
        engine.load("it", made("prompt")[1], allow_unverified=True)
        assert len(ask(engine, IDS[1:], {"it": 1.0})) == 2
        with pytest.raises(EngineError, match=f"a prompt of {N + len(IDS)} tokens"):
            engine.generate(Request(tuple(IDS), {"it": 1.0}))
    with Engine.open(tiny.path, replace(CONFIG, context=N)) as engine, pytest.raises(EngineError, match="has room for"):
        engine.load("it", made("prompt")[1], allow_unverified=True)


def saved(folder, tensors, **settings):
    folder.mkdir()
    save_file(tensors, folder / TENSORS)
    given = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **settings}
    (folder / SETTINGS).write_text(json.dumps(given))
    return folder


EMBEDDED = {"prompt_embeddings": np.ones((4, 256), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "settings", "fault"),
    [
        ({"prompt_embeddings": np.ones((4, 255), np.float32)}, {}, r"is \(4, 255\), expected \(n, 256\)"),
        (EMBEDDED, {"peft_type": "PREFIX_TUNING"}, r"is \(4, 256\), expected \(n, 512\)"),
        ({"prompt_embeddings": np.ones(256, np.float32)}, {}, r"is \(256,\)"),
        ({"prompt_embeddings": np.full((4, 256), np.nan, np.float32)}, {}, "NaN or infinite"),
        ({**EMBEDDED, "lm_head": np.ones(2, np.float32)}, {}, "it holds lm_head, prompt_embeddings"),
        (EMBEDDED, {"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS"),
        (EMBEDDED, {"num_transformer_submodules": 2, "modules_to_save": ["x"]}, "is 2, expected 1; modules_to_save"),
    ],
    ids=["width", "prefix", "vector", "nan", "more", "task", "settings"],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused(tiny, tmp_path, tensors, settings, fault):
    folder, allowed = saved(tmp_path / "it", tensors, **settings), ExportOptions(allow_unverified=True)
    with pytest.raises(AdapterError, match=fault):
        export(tiny.path, folder, tmp_path / "it.gguf", allowed)
    assert not (tmp_path / "it.gguf").exists()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_one_is_checked_without_a_base_too(made, tmp_path, kind):
    whole = tensors_of(made(kind)[1])
    name = {"prompt": "soft_prompt", "prefix": "prefix"}[kind]
    require_sound(GGUFFile(made(kind)[1]))
    for number, fault in enumerate(whole):
        values = whole[fault]
        broken = {**whole, fault: np.full_like(values, np.nan if values.dtype == np.float32 else -1)}
        for tensors in (broken, {n: v for n, v in whole.items() if n != fault} or {"other": values}):
            path = write(tmp_path / f"{number}-{len(tensors)}.gguf", tensors, name)
            with pytest.raises(AdapterError):
                require_sound(GGUFFile(path))


# -- every family -------------------------------------------------------------------------------------------------

SLIDING = ("gemma2", "gemma3_text", "gemma3_text-scaled")


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_every_family_computes_behind_it_what_peft_computes(family, converted, tmp_path, kind, name):  # noqa: F811
    """Embeddings scaled by some families, keys in another order in others, and caches that a window cuts."""
    base = open_base(converted(name))
    ids = torch.randint(3, 512, (min(LENGTH, base.context) - N,), generator=torch.Generator().manual_seed(1))
    model = get_peft_model(copy.deepcopy(family(name).theirs), copy.copy(KINDS[kind])).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
        theirs = model(ids[None]).logits[0, -len(ids) :].numpy()
    model.save_pretrained(tmp_path)
    trained = read_trained_prompt(tmp_path, base.config)
    everything = Example(ids.numpy(), np.arange(len(ids)) > 0)
    states = soft_states(base.path, tmp_path, [everything], np.tile(ids[:4].numpy(), (8, 1)).astype(np.int32), silent)
    ours = Head(base).logits(states.behind)
    spread = theirs.std() if base.config.hidden_act == "silu" else np.ptp(theirs)
    assert np.abs(ours - theirs[:-1]).max() <= 1e-3 * spread
    write_soft_prompt_gguf(tmp_path / "it.gguf", trained, base, "it", states.reference)
    content = read_soft(GGUFFile(tmp_path / "it.gguf"), base.architecture.gguf_name, base.config, base.context)
    with (
        closing(Model(base.path)) as model,
        closing(Context(model, n_ctx=base.context, n_sequences=1, threads=1, exact=True)) as context,
    ):
        if kind == "prefix" and name in SLIDING:
            with pytest.raises(EngineError, match="in a way that is not known here"):
                prepare(content, context, "it")
            return
        found = logits_behind(prepare(content, context, "it"), context, ids.tolist(), range(len(ids)))
    assert np.abs(found - theirs).max() <= 1e-3 * spread
