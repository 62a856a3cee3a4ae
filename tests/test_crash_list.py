"""What kills llama.cpp (DESIGN section 3): a typed error each, or the right answer, from an engine that lives on.

The engine is in a worker's child, so that a crash is a failure and not the end of the tests. Here everything comes from
outside; test_preflight.py and test_grammar.py have the reasons one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.data.conversation import Message
from edgelora.errors import AdapterError, EdgeloraError, Quarantined, WorkerDied
from runtime.service import EngineConfig, Request, Sampling
from runtime.supervise import Patience
from runtime.worker import Worker

CONFIG = EngineConfig(context=256, chunk=32, threads=1, conversations=2)
Q = "blk.0.attn_q.weight"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    base, path = open_base(tiny.path), tmp_path_factory.mktemp("adapter") / "good.gguf"
    write_adapter_gguf(path, make_adapter(base, strength=0.5), base, "good")
    return path


@pytest.fixture(scope="module")
def worker(tiny, adapter, tmp_path_factory) -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_HOME", str(tmp_path_factory.mktemp("home")))
        with Worker.open(tiny.path, CONFIG, patience=Patience(restarts=0)) as worker:
            worker.load("good", adapter)
            yield worker


@pytest.fixture
def alive(worker) -> Iterator[Worker]:
    """The worker; after the test its first child must still be there, and answer what it always did."""
    child, expected = worker._supervisor._child, answer(worker)
    yield worker
    assert answer(worker) == expected
    assert worker._supervisor._child is child


def answer(worker: Worker, prompt: Any = "turn on the light", n: int = 4, **options: Any) -> list[int]:
    request = Request(prompt, options.pop("adapters", {"good": 1.0}), Sampling(**options), n)
    return [token for piece in worker.generate(request) for token in piece.tokens]


def typed(error: EdgeloraError) -> bool:
    """An error that says what to do about it, and is not the crash itself."""
    bug = "fault of edgelora" in error.fix or "the engine failed" in error.what
    return not isinstance(error, WorkerDied | Quarantined) and not bug and all((error.what, error.why, error.fix))


# -- files ------------------------------------------------------------------------------------------------------------


def pair(name: str = Q, dtype: type = np.float32, value: float = 0.01) -> dict[str, np.ndarray]:
    return {f"{name}.lora_a": np.full((4, 256), value, dtype), f"{name}.lora_b": np.full((256, 4), value, dtype)}


def written(
    path: Path, tensors: dict[str, np.ndarray], *, kind: tuple[str, Any] = ("string", "adapter"),
    lora: tuple[str, Any] = ("string", "lora"), alpha: tuple[str, Any] | None = ("float32", 4.0),
) -> None:  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    for key, entry in (("general.type", kind), ("adapter.type", lora), ("adapter.lora.alpha", alpha)):
        if entry is not None:
            getattr(writer, f"add_{entry[0]}")(key, entry[1])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILES: dict[str, Callable[[Path], None]] = {
    "its kind is a number": lambda path: written(path, pair(), kind=("uint32", 3)),
    "its type is a list": lambda path: written(path, pair(), lora=("array", ["lora"])),
    "alpha is an integer": lambda path: written(path, pair(), alpha=("uint32", 4)),
    "alpha is a double": lambda path: written(path, pair(), alpha=("float64", 4.0)),
    "alpha is a text": lambda path: written(path, pair(), alpha=("string", "4")),
    "no alpha": lambda path: written(path, pair(), alpha=None),
    "alpha is NaN": lambda path: written(path, pair(), alpha=("float32", NAN)),
    "alpha is infinite": lambda path: written(path, pair(), alpha=("float32", INF)),
    "three dimensions": lambda path: written(path, {k: v[None] for k, v in pair().items()}),
    "32-bit integers": lambda path: written(path, pair(dtype=np.int32, value=1)),
    "8-bit integers": lambda path: written(path, pair(dtype=np.int8, value=1)),
    "doubles": lambda path: written(path, pair(dtype=np.float64)),
    "weights are NaN": lambda path: written(path, pair(value=NAN)),
    "weights are infinite": lambda path: written(path, pair(value=INF)),
    "weights overflow": lambda path: written(path, pair(value=3e38)),
    "the tied token embeddings": lambda path: written(
        path, {"token_embd.weight.lora_a": np.zeros((4, 512), np.float32),
               "token_embd.weight.lora_b": np.zeros((256, 4), np.float32)},
    ),
    "a base": lambda path: written(path, {Q: np.zeros((256, 256), np.float32)}, kind=("string", "model")),
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.touch(),
    "not there": lambda path: None,  # noqa: ARG005
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_would_kill_llama_cpp(alive, tmp_path, kind):
    FILES[kind](tmp_path / "bad.gguf")
    with pytest.raises(EdgeloraError) as fault:
        alive.load("bad", tmp_path / "bad.gguf", allow_unverified=True)
    assert typed(fault.value), fault.value
    assert list(alive.adapters) == ["good"]


def test_an_adapter_of_another_base(alive, make_tiny, tmp_path):
    other = open_base(make_tiny(seed=7).path)
    write_adapter_gguf(tmp_path / "other.gguf", make_adapter(other), other, "other")
    with pytest.raises(AdapterError, match="does not belong to"):
        alive.load("other", tmp_path / "other.gguf")


def test_a_truncated_adapter(alive, adapter, tmp_path):
    whole, path = adapter.read_bytes(), tmp_path / "cut.gguf"
    for length in (3, 24, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(EdgeloraError) as fault:
            alive.load("cut", path)
        assert typed(fault.value), fault.value


def test_an_adapter_that_is_truncated_once_it_is_loaded(alive, adapter, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(adapter.read_bytes())
    alive.load("cut", path)
    path.write_bytes(b"GGUF")
    assert answer(alive, adapters={"cut": 1.0}) == answer(alive, adapters={"good": 1.0})
    alive.unload("cut")


def test_a_base_that_is_truncated_once_it_is_mapped(tiny, tmp_path, monkeypatch):
    """Nothing can be done inside a process whose mapped file is cut: it gets SIGBUS. The parent gets an error."""
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path))
    path = tmp_path / "base.gguf"
    path.write_bytes(tiny.path.read_bytes())
    with Worker.open(path, CONFIG, patience=Patience(restarts=1, pause_seconds=0.01)) as worker:
        expected = answer(worker, adapters={})
        with path.open("r+b") as f:
            f.truncate(1000)
        with pytest.raises(WorkerDied, match="SIGBUS"):
            answer(worker, "another prompt", adapters={})
        with pytest.raises(WorkerDied, match=r"base\.gguf"):  # it cannot be opened again, and the error says why
            answer(worker, adapters={})
    path.write_bytes(tiny.path.read_bytes())
    with Worker.open(path, CONFIG) as worker:
        assert answer(worker, adapters={}) == expected


def test_bases_that_kill_llama_cpp(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path))
    whole, path = tiny.path.read_bytes(), tmp_path / "base.gguf"
    for raw in (
        b"",
        b"GGUF but not really",
        whole[:5000],
        whole[:-1],
        whole.replace(b"llama.block_count", b"llama.block_kount"),
    ):
        path.write_bytes(raw)
        with pytest.raises(EdgeloraError) as fault:
            Worker.open(path, CONFIG)
        assert typed(fault.value), fault.value


# -- requests ---------------------------------------------------------------------------------------------------------

NESTED = "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000
REQUESTS: dict[str, dict[str, Any]] = {
    "nested parentheses": {"grammar": NESTED},
    "unclosed parentheses": {"grammar": "root ::= " + "(" * 20_000},
    "a rule that begins with itself": {"grammar": 'root ::= root "a"'},
    "an undefined rule": {"grammar": "root ::= nowhere"},
    "no root": {"grammar": 'rule ::= "a"'},
    "half a character in a grammar": {"grammar": 'root ::= "\ud800"'},
    "a million repetitions": {"grammar": 'root ::= "a"{1000000}'},
    "no grammar": {"grammar": ""},
    "maxLength": {"json_schema": {"type": "string", "maxLength": 100_000}},
    "maxItems": {"json_schema": {"type": "array", "items": {"type": "string"}, "maxItems": 100_000}},
    "a schema in itself": {"json_schema": {"$ref": "#"}},
    "half a character in a schema": {"json_schema": {"type": "object", "properties": {"\ud800": {"type": "string"}}}},
    "an empty text to stop at": {"stop": ("",)},
    "half a character to stop at": {"stop": ("\ud800",)},
    "half a character in a role": {"prompt": [Message("\ud800", "a")]},
    "half a character in a name": {"prompt": [Message("user", "a", name="\udfff")]},
    "half a character in a call": {"prompt": [Message("assistant", None, ({"function": {"name": "\udfff"}},))]},
    "a message that says a number": {"prompt": [Message("user", 5)]},  # type: ignore[arg-type]
    "half a character": {"prompt": "a \ud800"},
    "half a character in a message": {"prompt": [Message("user", "a \udfff")]},
    "longer than the context": {"prompt": "turn on the light " * 500},
    "more tokens than the context has": {"prompt": [5] * 256},
    "messages longer than the context": {"prompt": [Message("user", "light " * 5000)]},
    "no prompt": {"prompt": ""},
    "no messages": {"prompt": []},
    "a token beyond the vocabulary": {"prompt": [5, 512]},
    "a negative token": {"prompt": [-1]},
    "a token beyond an int": {"prompt": [1 << 40]},
    "half a token": {"prompt": [1.5]},
    "no tokens wanted": {"n": 0},
    "fewer than no tokens wanted": {"n": -1},
    "an adapter that is not there": {"adapters": {"nobody": 1.0}},
    "a scale of NaN": {"adapters": {"good": NAN}},
    "a scale beyond reason": {"adapters": {"good": 1e30}},
    "a temperature of NaN": {"temperature": NAN},
    "a negative temperature": {"temperature": -1.0},
    "a negative top_k": {"top_k": -5},
    "a top_p of 2": {"top_p": 2.0, "temperature": 1.0},
    "a penalty of 0": {"repeat_penalty": 0.0},
    "a penalty of NaN": {"presence_penalty": NAN},
    "a penalty over more than the context": {"repeat_penalty": 1.1, "penalty_last_n": 1 << 40},
    "a dry_base of 0": {"dry_multiplier": 1.0, "dry_base": 0.0},
    "mirostat 3": {"mirostat": 3},
    "a seed beyond 32 bits": {"temperature": 1.0, "seed": 1 << 70},
    "a bias on no token": {"logit_bias": {512: 1.0}},
    "a bias of NaN": {"logit_bias": {5: NAN}},
    "more alternatives than tokens": {"logprobs": 513},
    "fewer than no alternatives": {"logprobs": -1},
}
RIGHT: dict[str, tuple[dict[str, Any], int]] = {  # what looks as bad and can be answered; and with how many tokens
    "more tokens than there can be": ({"prompt": [5] * 250, "n": 10**9, "logit_bias": {2: -INF, 0: -INF}}, 7),
    "a scale of 0": ({"adapters": {"good": 0.0}}, 4),
    "a negative scale": ({"adapters": {"good": -1.0}}, 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_that_would_kill_llama_cpp(alive, kind):
    with pytest.raises(EdgeloraError) as fault:
        answer(alive, **REQUESTS[kind])
    assert typed(fault.value), fault.value


@pytest.mark.parametrize("kind", RIGHT)
def test_a_request_that_looks_no_better(alive, kind):
    options, n = RIGHT[kind]
    assert len(answer(alive, **options)) == n


def test_all_of_them_at_once_beside_others_that_are_answered(alive):
    """Four threads: two of them ask only what cannot be, and the answers of the others stay what they are."""
    expected = {n: answer(alive, n=n) for n in (1, 3, 6)}
    wrong: list[object] = []

    def good() -> None:
        for _ in range(5):
            wrong.extend(n for n, tokens in expected.items() if answer(alive, n=n) != tokens)

    def bad(kinds: list[str]) -> None:
        for kind in kinds:
            try:
                answer(alive, **REQUESTS[kind])
                wrong.append(kind)
            except EdgeloraError as e:
                if not typed(e):
                    wrong.append((kind, e))

    kinds = list(REQUESTS)
    threads = [threading.Thread(target=good) for _ in range(2)]
    threads += [threading.Thread(target=bad, args=(kinds[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
