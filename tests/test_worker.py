"""The worker: a child that dies in any way costs one typed error each, and the same child cannot be killed for ever.

Tested with a service that does what its prompt says, dying included; test_worker_engine.py has the engine in it. What
this file imports each child imports again.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgelora.device import Choice
from edgelora.errors import AdapterError, EngineError, Quarantined, WorkerDied
from edgelora.files.contract import sha256_file
from runtime.service import AdapterInfo, EngineConfig, Piece, Request, Sampling, Usage
from runtime.supervise import Patience
from runtime.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
HASTY = Patience(open_seconds=30, silent_seconds=30, close_seconds=5, pause_seconds=0.01)


def die(how: str) -> None:
    """End this process as C code does."""
    match how:
        case "abort":
            ctypes.CDLL(None).abort()
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(7)
        case "words":
            os.write(2, b"GGML_ASSERT(n_dims == 2) failed\n")
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
            ctypes.CDLL(None).abort()


class Obedient:
    """A service that does what the first word of a prompt says. An adapter's file is such a word, done when loaded or
    (`later …`) when asked under it."""

    name, threads = "obedient", Choice("1", "it computes nothing")

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterInfo] = {}
        self.log: list[str] = []
        self.closed = False

    def load(self, name: str, path: Path, *, allow_unverified: bool = False) -> AdapterInfo:
        text = path.read_text()
        if text == "refused":
            raise AdapterError(what=f"{path}: refused", why="it says so", fix="take another")
        die(text)
        self.adapters[name] = AdapterInfo(name, sha256_file(path), path, len(text), single_turn=allow_unverified)
        return self.adapters[name]

    def unload(self, name: str, *, wait_seconds: float = 0.0) -> None:  # noqa: ARG002
        del self.adapters[name]

    def generate(self, request: Request) -> Answer:
        for name in request.adapters:
            die(self.adapters[name].path.read_text().removeprefix("later "))
        word, _, rest = str(request.prompt).partition(" ")
        if word == "refuse":
            raise EngineError(what="refused", why="it was asked to", fix="ask for something else")
        if word == "bug":
            raise ZeroDivisionError("division by zero")
        if word == "die":
            die(rest)
        return Answer(self, word, rest)

    def close(self) -> None:
        self.closed = True


class Answer:
    usage: Usage | None = None

    def __init__(self, service: Obedient, word: str, rest: str) -> None:
        self.service, self.word, self.rest = service, word, rest
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[Piece]:
        n = 0
        for n, piece in enumerate(self.pieces(), 1):  # noqa: B007
            yield piece
            if self.cancelled.is_set():
                break
        self.usage = Usage(0, 0, n, 0.0, 0.0, 0.0, 0, "cancelled" if self.cancelled.is_set() else "stop")

    def pieces(self) -> Iterator[Piece]:
        match self.word:
            case "pid":
                yield Piece(str(os.getpid()))
            case "names":
                yield Piece(" ".join(self.service.adapters))
            case "made":  # how many pieces of earlier endless streams were made
                yield Piece(self.service.log[-1])
            case "count":
                yield from (Piece(f"{i} ", (i,)) for i in range(int(self.rest)))
            case "endless":
                for i in range(1 << 40):
                    self.service.log.append(str(i))
                    yield Piece("x" * 1000)
            case "hang":
                yield Piece("so far")
                self.cancelled.wait()
            case "hold":
                yield Piece("so far")
                ctypes.PyDLL(None).sleep(60)  # in C, and no other thread of the interpreter goes on meanwhile
            case "sleep":
                time.sleep(float(self.rest))
                yield Piece("awake")
            case "half":
                yield Piece("half an answer")
                die(self.rest)

    def cancel(self) -> None:
        self.cancelled.set()


def obedient(base: Path, _: EngineConfig) -> Obedient:
    text = base.read_text()
    if text == "refused":
        raise EngineError(what=f"{base}: refused", why="it says so", fix="take another")
    if text == "slow":
        time.sleep(60)
    die(text)
    return Obedient()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_text("good")
    return path


@pytest.fixture
def worker(base: Path) -> Iterator[Worker]:
    with Worker.open(base, factory=obedient, patience=HASTY) as worker:
        yield worker


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One for the tests in which nobody dies."""
    base = tmp_path_factory.mktemp("shared") / "base"
    base.write_text("good")
    with Worker.open(base, factory=obedient, patience=HASTY) as worker:
        yield worker


def answer(worker: Worker, prompt: str, **options: object) -> str:
    return "".join(piece.text for piece in worker.generate(Request(prompt, **options)))  # type: ignore[arg-type]


def adapter(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


# -- nobody dies ------------------------------------------------------------------------------------------------------


def test_it_answers_as_the_service_in_it(shared):
    stream = shared.generate(Request("count 300"))
    assert stream.usage is None
    assert [piece.tokens for piece in stream] == [(i,) for i in range(300)]
    assert stream.usage.generated_tokens == 300
    assert list(stream) == []
    assert (shared.name, shared.threads.value) == ("obedient", "1")
    assert int(answer(shared, "pid")) != os.getpid()


def test_what_the_service_raises_comes_out_as_it_is(shared, tmp_path):
    with pytest.raises(EngineError) as fault:
        shared.generate(Request("refuse"))
    assert type(fault.value) is EngineError
    assert str(fault.value).splitlines() == [
        "refused", "  why: it was asked to", "  fix: ask for something else"
    ]  # fmt: skip
    with pytest.raises(AdapterError, match="refused"):
        shared.load("a", adapter(tmp_path, "a", "refused"))
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        shared.generate(Request("bug"))
    with pytest.raises(EngineError, match="FileNotFoundError"):
        shared.load("a", tmp_path / "nowhere")


def test_adapters_are_known_on_this_side(shared, tmp_path):
    path = adapter(tmp_path, "a", "good")
    info = shared.load("a", path, allow_unverified=True)
    assert (info.path, info.digest, info.single_turn) == (path, sha256_file(path), True)
    assert dict(shared.adapters) == {"a": info}
    shared.unload("a")
    assert not shared.adapters


def test_a_slow_reader_stops_the_stream_and_nobody_elses(shared):
    stream = shared.generate(Request("endless"))
    time.sleep(0.3)
    before = int(answer(shared, "made"))
    time.sleep(0.1)
    assert int(answer(shared, "made")) == before < 100
    for _, _piece in zip(range(200), stream, strict=False):
        pass
    assert 200 <= int(answer(shared, "made")) < 300
    stream.cancel()
    assert stream.usage.finish == "cancelled"


def test_cancel_ends_a_stream_that_waits_in_the_child_or_for_its_reader(shared):
    for prompt in ("hang", "endless"):
        stream = shared.generate(Request(prompt))
        assert next(iter(stream)).text
        stream.cancel()
        assert stream.usage.finish == "cancelled"
        assert list(stream) == []
        stream.cancel()


def test_a_stream_that_nobody_reads_any_more_is_cancelled(shared):
    stream = shared.generate(Request("endless"))
    next(iter(stream))
    pending = stream._pending
    del stream
    gc.collect()
    assert pending.ended.wait(5)
    assert pending.value.finish == "cancelled"


def test_eight_threads_at_once(shared):
    found: list[list[str]] = []

    def ask() -> None:
        found.append([answer(shared, f"count {n}") for n in (1, 100, 7)])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["".join(f"{i} " for i in range(n)) for n in (1, 100, 7)]] * 8


def test_what_cannot_be_sent_is_refused_here(shared):
    deep: dict[str, object] = {}
    for _ in range(20_000):
        deep = {"items": deep}
    with pytest.raises(EngineError, match="cannot be sent"):
        shared.generate(Request("count 1", sampling=Sampling(json_schema=deep)))
    assert (
        answer(shared, "count 2", sampling=Sampling(stop=("\ud800",))) == "0 1 "
    )  # what can be sent is the engine's matter


# -- somebody dies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["abort", "segfault", "exit", "kill", "memory"])
def test_a_death_is_a_typed_error_and_a_new_child_has_the_same_adapters(worker, tmp_path, how):
    for name in ("b", "a"):
        worker.load(name, adapter(tmp_path, name, name), allow_unverified=True)
    first = answer(worker, "pid")
    waiting = worker.generate(Request("hang"))
    pieces = iter(waiting)
    next(pieces)
    with pytest.raises(WorkerDied):
        worker.generate(Request(f"die {how}"))
    with pytest.raises(WorkerDied):
        next(pieces)
    assert waiting.usage is None
    assert answer(worker, "names") == "b a"
    assert list(worker.adapters) == ["b", "a"]
    assert answer(worker, "pid") != first


def test_the_error_says_how_it_ended(worker):
    stream = worker.generate(Request("half words"))
    pieces = iter(stream)
    assert next(pieces).text == "half an answer"
    with pytest.raises(WorkerDied) as fault:
        next(pieces)
    assert str(fault.value).splitlines() == [
        "the process that holds the model ended (SIGABRT)",
        "  why: GGML_ASSERT(n_dims == 2) failed",
        "  fix: ask once more: it is being started again, and what ends it twice is refused from then on",
    ]
    with pytest.raises(WorkerDied):
        next(iter(stream))


def test_a_request_that_killed_twice_is_refused(worker):
    for _ in range(2):
        with pytest.raises(WorkerDied):
            answer(worker, "die abort")
    pid = answer(worker, "pid")
    for _ in range(3):
        with pytest.raises(Quarantined) as fault:
            answer(worker, "die abort")
    assert str(fault.value).splitlines()[0] == "this request is refused"
    assert answer(worker, "pid") == pid
    with pytest.raises(WorkerDied):  # another request is another matter
        answer(worker, "die abort", max_tokens=3)


def test_who_was_only_there_is_not_refused(worker):
    """The guilty one and an innocent one are asked together, again and again, the innocent one being answered too."""
    for _ in range(4):
        innocent = worker.generate(Request("sleep 0.2"))
        with pytest.raises(WorkerDied):
            worker.generate(Request("die abort"))
        with pytest.raises(WorkerDied):
            list(innocent)
        assert answer(worker, "sleep 0.2") == "awake"
    with pytest.raises(Quarantined):
        worker.generate(Request("die abort"))
    assert answer(worker, "sleep 0.2") == "awake"


def test_a_load_takes_the_blame_alone(worker, tmp_path):
    for how in ("abort", "segfault", "exit", "kill"):
        innocent = worker.generate(Request("sleep 2"))
        with pytest.raises(WorkerDied):
            worker.load(how, adapter(tmp_path, how, how))
        with pytest.raises(WorkerDied):
            list(innocent)
    assert answer(worker, "sleep 2") == "awake"


def test_a_file_that_killed_twice_is_refused_whatever_its_name(worker, tmp_path):
    worker.load("good", adapter(tmp_path, "good", "good"))
    for name in ("x", "y"):
        with pytest.raises(WorkerDied):
            worker.load(name, adapter(tmp_path, name, "segfault"))
    with pytest.raises(Quarantined, match="z is refused"):
        worker.load("z", adapter(tmp_path, "z", "segfault"))
    assert list(worker.adapters) == ["good"]
    assert answer(worker, "names") == "good"


def test_an_adapter_that_kills_whatever_is_asked_is_refused_in_the_end(worker, tmp_path):
    worker.load("bad", adapter(tmp_path, "bad", "later abort"))
    worker.load("good", adapter(tmp_path, "good", "good"))
    for n in range(4):
        with pytest.raises(WorkerDied):
            answer(worker, f"count {n}", adapters={"bad": 1.0})
        assert answer(worker, "count 1", adapters={"good": 1.0}) == "0 "
    with pytest.raises(Quarantined, match="bad is refused"):
        answer(worker, "count 9", adapters={"bad": 1.0})
    assert answer(worker, "names") == "good"
    with pytest.raises(Quarantined):
        worker.load("again", tmp_path / "bad")


def test_an_adapter_whose_file_changed_is_lost_with_a_reason(worker, tmp_path):
    changed, gone = adapter(tmp_path, "changed", "one"), adapter(tmp_path, "gone", "two")
    worker.load("changed", changed)
    worker.load("gone", gone)
    worker.load("good", adapter(tmp_path, "good", "good"))
    changed.write_text("another")
    gone.unlink()
    with pytest.raises(WorkerDied):
        answer(worker, "die kill")
    assert answer(worker, "names") == "good"
    assert list(worker.adapters) == ["good"]
    with pytest.raises(AdapterError, match="changed was lost"):
        answer(worker, "count 1", adapters={"changed": 1.0})
    with pytest.raises(EngineError, match="FileNotFoundError"):
        answer(worker, "count 1", adapters={"gone": 1.0})
    worker.load("changed", changed)
    assert answer(worker, "count 1", adapters={"changed": 1.0}) == "0 "


def test_one_that_hangs_is_killed(base):
    with Worker.open(base, factory=obedient, patience=Patience(silent_seconds=0.5, pause_seconds=0.01)) as worker:
        idle = worker.generate(Request("endless"))  # its reader is slow: this is no hanging
        time.sleep(1.5)
        assert next(iter(idle)).text
        idle.cancel()
        with pytest.raises(WorkerDied) as fault:
            answer(worker, "sleep 20")
        assert fault.value.why == "it said nothing for 0.5 s"
        time.sleep(1.5)  # nor is this: nothing is asked
        assert answer(worker, "count 1") == "0 "


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process by SIGSTOP and looks into /proc")
def test_a_stopped_child_is_killed_too(base):
    with Worker.open(base, factory=obedient, patience=Patience(silent_seconds=0.5, pause_seconds=0.01)) as worker:
        os.kill(int(answer(worker, "pid")), signal.SIGSTOP)
        with pytest.raises(WorkerDied):
            answer(worker, "count 1")
        assert answer(worker, "count 1") == "0 "


def test_it_gives_up_after_some_restarts(base):
    patience = Patience(restarts=3, pause_seconds=0.01)
    with Worker.open(base, factory=obedient, patience=patience) as worker:
        for n in range(3):
            with pytest.raises(WorkerDied, match="is being started again"):
                answer(worker, "die abort", max_tokens=n)
        with pytest.raises(WorkerDied):
            answer(worker, "die abort", max_tokens=3)
        with pytest.raises(WorkerDied, match="ended 4 times without an answer"):
            answer(worker, "count 1")


def test_a_base_that_became_unusable_ends_the_worker(base):
    patience = Patience(restarts=2, pause_seconds=0.01)
    with Worker.open(base, factory=obedient, patience=patience) as worker:
        base.write_text("refused")
        with pytest.raises(WorkerDied):
            answer(worker, "die abort")
        with pytest.raises(WorkerDied, match="base: refused: it says so"):
            answer(worker, "count 1")


def test_a_fault_at_the_start_is_told_once_and_not_tried_again(base):
    base.write_text("refused")
    with pytest.raises(EngineError, match="refused") as fault:
        Worker.open(base, factory=obedient, patience=HASTY)
    assert type(fault.value) is EngineError
    base.write_text("words")
    with pytest.raises(WorkerDied, match="GGML_ASSERT"):
        Worker.open(base, factory=obedient, patience=HASTY)
    base.write_text("slow")
    with pytest.raises(WorkerDied, match=r"not ready after 0\.5 s"):
        Worker.open(base, factory=obedient, patience=Patience(open_seconds=0.5))


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_closed_worker_says_so(base):
    worker = Worker.open(base, factory=obedient, patience=HASTY)
    pid = int(answer(worker, "pid"))
    stream = worker.generate(Request("hang"))
    worker.close()
    with pytest.raises(EngineError, match="closed worker"):
        list(stream)
    for use in (lambda: worker.generate(Request("pid")), lambda: worker.unload("a"), lambda: worker.name):
        with pytest.raises(EngineError, match="closed worker"):
            use()
    worker.close()
    with pytest.raises(ProcessLookupError):  # not even a zombie is left
        os.kill(pid, 0)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_deaths_leave_no_files_threads_or_processes(base):
    def held() -> tuple[int, int, str]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children

    before = held()
    with Worker.open(base, factory=obedient, patience=HASTY) as worker:
        answer(worker, "count 1")
        open_ = held()[:2]
        for n in range(4):
            with pytest.raises(WorkerDied):
                answer(worker, "die kill", max_tokens=n)
            answer(worker, "count 1")
        assert held()[:2] == open_
    assert held() == before


PARENT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from runtime.service import Request
from runtime.worker import Worker
from test_worker import obedient
if __name__ == "__main__":
    worker = Worker.open(Path({base!r}), factory=obedient)
    print(next(iter(worker.generate(Request("pid")))).text, flush=True)
    stream = worker.generate(Request(sys.argv[1]))
    try:
        for piece in stream:
            print(piece.text, flush=True)
    except KeyboardInterrupt:
        stream.cancel()
        print(stream.usage.finish, next(iter(worker.generate(Request("pid")))).text, flush=True)
"""


@pytest.fixture
def parent(base: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], int]]]:
    """`parent(prompt)`: a program that reads a stream, in a process group of its own; and its worker's child."""
    started: list[subprocess.Popen[str]] = []

    def start(prompt: str) -> tuple[subprocess.Popen[str], int]:
        code = PARENT.format(tests=str(ROOT / "tests"), root=str(ROOT), base=str(base))
        command = [sys.executable, "-P", "-c", code, prompt]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
        started.append(process)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.stdout.readline() == "so far\n"
        return process, child

    yield start
    for process in started:
        process.kill()
        process.communicate()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():  # of a parent that died: init's to bury
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("prompt", ["hang", "hold"])
def test_no_child_outlives_its_parent(parent, prompt):
    if prompt == "hold" and sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent whatever it does")
    process, child = parent(prompt)
    process.kill()
    assert gone(child)


def test_ctrl_c_is_the_parents(parent):
    process, child = parent("hang")
    os.killpg(process.pid, signal.SIGINT)
    os.kill(child, signal.SIGINT)
    assert process.stdout.readline() == f"cancelled {child}\n"
    assert process.wait(10) == 0  # it never closed its worker, and yet ends
    assert gone(child)


def test_this_side_never_loads_llama_cpp():
    code = "import sys, runtime.worker; print({'llama_cpp', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
