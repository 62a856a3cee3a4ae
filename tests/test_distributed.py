"""Several processes train as one does: the same losses and the same adapter, whatever the base is held as."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import Forked
from gguf.constants import GGMLQuantizationType as Type
from resumed import outcome, run_folder
from safetensors.numpy import load_file
from test_architectures import family  # noqa: F401  (a fixture)
from test_recompute import adapted, gradients

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.data.pack import Batch
from edgelora.errors import ConfigError
from edgelora.training import distributed, sharding
from edgelora.training.distributed import ARRIVED, Processes
from edgelora.training.metrics import Metrics, read_metrics
from edgelora.training.run import run_training
from edgelora.training.sharding import frozen, shard, share_of, stored_bytes

CLOSE = 1e-4

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows to learn and rows held out: conversations, pairs and rated answers."""
    rows = (ROOT / "examples" / "home" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    spoken = [json.loads(row)["messages"] for row in rows]
    folder = tmp_path_factory.mktemp("data")
    asked = [{"prompt": m[:-1], "chosen": m[-1:], "rejected": spoken[i - 1][-1:]} for i, m in enumerate(spoken)]
    rated = [{"prompt": m[:-1], "completion": m[-1:], "label": i % 3 > 0} for i, m in enumerate(spoken)]
    for name, all_rows in (("sft", [{"messages": m} for m in spoken]), ("dpo", asked), ("kto", rated)):
        for part, some in (("train", all_rows[:22]), ("valid", all_rows[22:])):
            (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def settings(make_tiny: Callable[..., Any], data: Path) -> Callable[..., TrainConfig]:
    """`settings(out, **changes)`: five steps of five rows, in about three micro-batches each: an odd number for two."""

    def make(out: Path, **changes: Any) -> TrainConfig:
        rows = changes.get("objective", "sft")
        defaults = {
            "base": make_tiny(Type.Q8_0).path, "data": data / f"{rows}-train.jsonl",
            "valid": data / f"{rows}-valid.jsonl", "rank": 4, "learning_rate": 5e-3, "warmup_steps": 1,
            "dtype": "f32",  # bfloat16 would make a difference in the last bit one of a thousandth
            "max_steps": 5, "epochs": 3, "batch_rows": 5, "micro_batch_tokens": 96, "eval_every": 2, "save_every": 1,
            "keep_checkpoints": 100,
        }  # fmt: skip
        return TrainConfig(**{**defaults, "out": out, **changes})

    return make


def command(config: TrainConfig) -> list[str]:
    """`edgelora train` with every setting that differs from its default."""
    words = ["train", str(config.base), *map(str, config.data)]
    for name in sorted(config.model_fields_set - {"base", "data"}):
        value = getattr(config, name)
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not False:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def torchrun(processes: int, *words: str) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launch, *words]


def run(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(processes, *words), cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )


def trained(processes: int, config: TrainConfig) -> str:
    """Train in processes that meet as torchrun's do, forked instead of started; returns what they said."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    logs = [config.out.with_name(f"{config.out.name}-{rank}.log") for rank in range(processes)]
    started = [
        Forked(command(config), log, {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    codes = [process.wait(timeout=110) for process in started]
    said = "".join(log.read_text(encoding="utf-8") for log in logs)
    assert codes == [0] * processes, said
    return said


def lines(out: Path) -> list[Metrics]:
    return read_metrics(run_folder(out) / "metrics.jsonl")


def tensors(out: Path) -> dict[str, np.ndarray]:
    return dict(load_file(out / "adapter_model.safetensors"))


# -- two processes are as good as one -----------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "sft, with noise and a moving average": {"neftune_alpha": 5.0, "ema_decay": 0.5},
    "sharded blocks, recomputed": {"shard_base": True, "recompute": "full"},
    "sharded nf4, dora": {"shard_base": True, "base_dtype": "nf4", "method": "dora"},
    "sharded blocks, pissa": {"shard_base": True, "method": "pissa"},
    "dpo": {"objective": "dpo"},
    # its reference point takes another number of passes in each process
    "sharded bf16, kto": {"shard_base": True, "base_dtype": "bf16", "objective": "kto"},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(settings, tmp_path, way):
    alone, shared = settings(tmp_path / "alone", **WAYS[way]), settings(tmp_path / "shared", **WAYS[way])
    run_training(alone)
    trained(2, shared)
    one, two = lines(alone.out), lines(shared.out)
    assert [line.step for line in two] == [line.step for line in one] == list(range(6))
    for a, b in zip(one, two, strict=True):
        assert b.tokens == a.tokens
        for name in ("loss", "held_out_loss", "grad_norm"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), abs=CLOSE), (b.step, name)
        for name in ("numbers", "held_out_numbers"):  # of two whose micro-batches each has a part of
            assert dict(getattr(b, name)) == pytest.approx(dict(getattr(a, name)), rel=1e-3, abs=CLOSE), (b.step, name)
    assert abs(one[-1].loss - one[1].loss) > 100 * CLOSE  # it did learn something
    ours, theirs = tensors(shared.out), tensors(alone.out)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=CLOSE, rtol=0, err_msg=name)


def test_torchrun_with_one_process_changes_no_bit(settings, tmp_path):
    run_training(settings(tmp_path / "alone"))
    done = run(1, "-m", "edgelora", *command(settings(tmp_path / "shared", shard_base=True)))
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    assert "processes: 1 (it holds the whole base" in " ".join(done.stderr.split())
    assert outcome(tmp_path / "shared") == outcome(tmp_path / "alone")


# -- stopped and gone on with -------------------------------------------------------------------------------------


@pytest.fixture
def child(settings, at_first_step, tmp_path) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    """`child(**changes)`: a long run in two processes, given back when its first step is done, and its `--out`."""

    def start(**changes: Any) -> tuple[subprocess.Popen[str], Path]:
        out = tmp_path / "mine"
        words = command(settings(out, max_steps=2000, epochs=1000, **changes))
        return at_first_step(torchrun(2, "-m", "edgelora", *words), run_folder(out) / "metrics.jsonl"), out

    return start


def workers(process: subprocess.Popen[str]) -> dict[int, int]:
    """The process ids of what torchrun started, by rank."""
    found = {}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(line.removeprefix(b"RANK=")) for line in environment if line.startswith(b"RANK=")]
        found.update(dict.fromkeys(ranks, pid))
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc says which process is which")


@linux
def test_a_signal_to_one_stops_all_behind_the_same_step(child):
    process, out = child(save_every=1000, eval_every=1000)
    os.kill(workers(process)[1], signal.SIGTERM)
    _, talk = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "the signal SIGTERM" in talk
    assert "go on, under torchrun as before, with: " in talk
    assert talk.count("nothing is lost") == 1  # the first process alone talks
    step = lines(out)[-1].step
    assert [path.name for path in (run_folder(out) / "checkpoints").iterdir()] == [f"step-{step:08}"]
    assert not out.exists()


def test_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path):
    """Stopped by torchrun's processes, gone on with by them: bit for bit. By one process: but for rounding."""
    whole = settings(tmp_path / "whole", shard_base=True, neftune_alpha=5.0, ema_decay=0.5)
    trained(2, whole)
    for processes, name in ((2, "again"), (1, "alone")):
        out = tmp_path / name
        shutil.copytree(run_folder(whole.out), run_folder(out))
        for path in (run_folder(out) / "checkpoints").glob("step-*"):
            if path.name > "step-00000003":
                shutil.rmtree(path)
        said = trained(processes, whole.model_copy(update={"out": out, "resume": True}))
        assert "going on behind step 3" in said
        assert ("it goes on with processes 1 instead of 2" in said) == (processes == 1)
    assert outcome(tmp_path / "again") == outcome(whole.out)
    for one, two in zip(lines(tmp_path / "alone"), lines(whole.out), strict=True):
        assert one.loss == pytest.approx(two.loss, abs=CLOSE)


def test_a_step_that_one_process_began_is_begun_again_by_two(settings, tmp_path):
    """Its gradients are in the checkpoint, and would be counted twice."""
    script = (
        "import sys; from edgelora.cli import run; from edgelora.training import loop\n"
        "loop.SAVE_EVERY_S = 0.0; sys.exit(run(sys.argv[1:]))"
    )
    config = settings(tmp_path / "mine", max_steps=3)
    subprocess.run([sys.executable, "-c", script, *command(config)], cwd=ROOT, check=True, timeout=60)
    one = lines(config.out)
    shutil.rmtree(config.out)
    kept = sorted((run_folder(config.out) / "checkpoints").glob("step-*"))
    begun = next(path for path in kept if path.name.startswith("step-00000001-"))
    for path in kept:
        if path.name > begun.name:
            shutil.rmtree(path)
    trained(2, config.model_copy(update={"resume": True}))
    for a, b in zip(one, lines(config.out), strict=True):
        assert b.loss == pytest.approx(a.loss, abs=CLOSE)


# -- a process that fails -----------------------------------------------------------------------------------------

FAILS = """
import os, signal, sys
from edgelora.errors import DataError
from edgelora.training import loop

how, *words = sys.argv[1:]
update = loop._update

def fail(job, state):
    if job.world.rank == 1 and state.step == 2:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("a row broke", "it was made to", "mend it") if how == "typed" else ValueError("a fault")
    return update(job, state)

loop._update = fail
sys.argv[1:] = words
from edgelora.__main__ import main
main()
"""


TOLD = {
    "typed": "error: process 1: a row broke\n  why: it was made to\n  fix: mend it\n",
    "untyped": "error: process 1: ValueError: a fault\n",
    "dies": "error: another process of this run is gone\n",
}


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("typed", {}),
        ("untyped", {"shard_base": True}),
        ("dies", {}),
        ("dies", {"shard_base": True}),
        pytest.param("typed", {"shard_base": True}, marks=pytest.mark.exhaustive),
        pytest.param("untyped", {}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_process_that_fails_ends_the_others_with_its_error(settings, tmp_path, how, changes):
    (tmp_path / "fails.py").write_text(FAILS)
    for name in ("mine", "again"):
        config = settings(tmp_path / name, **changes)
        started = time.monotonic()
        done = run(2, str(tmp_path / "fails.py"), how, *command(config))
        assert time.monotonic() - started < 60
        assert done.returncode != 0
        if how != "dies" or TOLD[how] in done.stderr:
            break  # torchrun, which sees a death too, may end the others in the moment in which they would say so
    assert done.stderr.count(TOLD[how]) == 1
    assert ("ValueError: a fault\n\n" in done.stderr or "Traceback" in done.stderr) or how == "typed"
    assert not config.out.exists()
    assert [line.step for line in lines(config.out)] == [0, 1, 2]  # what was done stands, to be gone on with


def test_what_all_refuse_is_said_once(settings, tmp_path):
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"messages": []}\n')
    done = run(2, "-m", "edgelora", *command(settings(tmp_path / "mine", data=broken)))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert not run_folder(tmp_path / "mine").exists()


OTHERS = """
import os, sys
from pathlib import Path
from edgelora.config import Source
from edgelora.training import ready
from edgelora.__main__ import main

_, other, *words = sys.argv
sys.argv[1:] = words
load = ready.load_rows
if os.environ["RANK"] == "1":
    ready.load_rows = lambda config, *rest: load(config.model_copy(update={"data": (Source(Path(other)),)}), *rest)
main()
"""


def test_processes_that_read_other_rows_are_refused(settings, tmp_path):
    """As on a second machine, whose file of the same name is another one."""
    (tmp_path / "others.py").write_text(OTHERS)
    config = settings(tmp_path / "mine")
    rows = config.data[0].path
    other = tmp_path / rows.name
    other.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    done = run(2, str(tmp_path / "others.py"), str(other), *command(config))
    assert done.returncode != 0
    assert done.stderr.count("error: the base or the rows are not the same") == 1
    assert not run_folder(config.out).exists()


def test_a_process_without_a_card_is_refused(monkeypatch):
    world = world_of(1, 2)
    world.local_rank, world.local_size = 1, 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError) as caught:
        world.use("cuda")
    assert str(caught.value).splitlines() == [
        "--device cuda: there is no card for process 1",
        "  why: 2 processes on this machine take a card each, of 1",
        "  fix: pass torchrun a smaller --nproc-per-node, and leave the choice of the card to it",
    ]


@pytest.mark.parametrize(
    ("asked", "processes", "expected"), [(None, 2, 3), ("1", 2, 3), ("2", 2, 2), ("1", 1, 1), ("0", 1, 1)], ids=str
)
def test_the_cores_are_divided_among_the_processes_of_a_machine(monkeypatch, asked, processes, expected):
    """torchrun itself asks for one thread where nobody asked."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(distributed, "physical_cores", lambda: 7)
    world = world_of(1, 2)
    world.local_size = processes
    assert distributed.choose_threads(world).value == str(expected)


# -- dealing out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["blocks", "nf4", "bf16"])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_shares_of_a_layer_are_its_bytes(make_tiny, how, processes):
    decoder = build_decoder(open_base(make_tiny(Type.Q8_0).path), how)
    stored = [part for linear in decoder.linears.values() for part in stored_bytes(linear.weight)]
    starts = np.cumsum([0, *(len(part) + 5 for part in stored)]).tolist()  # with gaps
    n = -(-starts[-1] // processes)
    whole = np.concatenate([share_of(stored, starts, rank * n, n).numpy() for rank in range(processes)])
    for part, start in zip(stored, starts, strict=False):
        assert whole[start : start + len(part)].tobytes() == part.tobytes()
    assert sum(map(len, stored)) == sum(linear.weight.size_bytes for linear in decoder.linears.values())


def world_of(rank: int, size: int) -> Processes:
    """A process that reaches no other."""
    world = Processes.__new__(Processes)
    world.rank, world.size, world.device, world.data = rank, size, torch.device("cpu"), None
    return world


@pytest.mark.parametrize(
    ("name", "how"), [("mixtral", "blocks"), ("mixtral", "nf4"), ("phi3", "q8_0"), ("gemma3_text", "bf16")]
)
def test_a_sharded_decoder_computes_the_same_bits(family, name, how, monkeypatch):  # noqa: F811
    """Forward, backward and recomputed; three processes hold a third each, and one of them computes."""
    base = open_base(family(name).folder)
    wanted = gradients(adapted(base, how=how), recompute=True)
    whole = sum(weight.size_bytes for layer in build_decoder(base, how).model.layers for weight in frozen(layer))
    decoders, worlds = [adapted(base, how=how) for _ in range(3)], [world_of(rank, 3) for rank in range(3)]
    gathered: list[torch.Tensor] = []

    def gather(out: torch.Tensor, share: torch.Tensor, group: None) -> None:
        assert group is None  # gloo
        held = [world.hand_out.__self__.shares for world in worlds]
        (layer,) = (i for i, mine in enumerate(held[1]) if mine is share)
        torch.cat([shares[layer] for shares in held], out=out)
        gathered.append(share)

    monkeypatch.setattr(sharding.dist, "all_gather_single", gather)
    for decoder, world in zip(decoders, worlds, strict=True):
        world.meet_for = lambda layer, world=world: world.hand_out(layer)
        kept = shard(decoder, world)
        assert whole / 3 <= kept < 1.1 * whole / 3
    found = gradients(decoders[1], recompute=True)
    assert torch.equal(found[0], wanted[0])
    assert all(map(torch.equal, found[1], wanted[1]))
    n = len(decoders[1].model.layers)
    assert len(gathered) == 2 * n - 1  # each layer forwards, and backwards all but the last, which is still there


class Threads(Processes):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[int]) -> None:
        self.rank, self.size, self._barrier, self._said = rank, len(said), barrier, said
        self.hand_out, self.given, self.got = self.given_out, [], []

    def given_out(self, layer: int) -> None:
        self.given.append(layer)

    def _meet(self, says: int) -> list[int]:
        self._said[self.rank] = says
        self._barrier.wait(timeout=20)
        heard = list(self._said)
        self._barrier.wait(timeout=20)
        return heard

    def work(self, wishes: list[int]) -> None:
        for wish in wishes:
            self.meet_for(wish)
            self.got.append(self.given[-1])
        self.meet_for(ARRIVED)


def wishes(draw: np.random.Generator, is_orderly: bool) -> list[int]:
    """Layers, forwards and backwards, a few times; or any of five in any order."""
    n = int(draw.integers(4))
    return [*range(5), *range(3, -1, -1)] * n if is_orderly else draw.integers(5, size=9 * n).tolist()


@pytest.mark.parametrize("is_orderly", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_processes_with_unlike_passes_all_get_their_layers(seed, is_orderly):
    draw = np.random.default_rng(seed)
    barrier, said = threading.Barrier(3), [0] * 3
    worlds = [Threads(rank, barrier, said) for rank in range(3)]
    passes = [wishes(draw, is_orderly) for _ in worlds]
    threads = [threading.Thread(target=world.work, args=(one,)) for world, one in zip(worlds, passes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [world.got for world in worlds] == passes
    assert worlds[0].given == worlds[1].given == worlds[2].given  # all take part in each exchange
    if is_orderly:
        assert len(worlds[0].given) == max(map(len, passes))  # who has fewer passes costs the others nothing


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_every_micro_batch_is_dealt_once_and_all_have_as_many(size, n):
    batches = [Batch(np.arange(1), np.arange(1), 0, (0, 1), np.arange(1), number) for number in range(n)]
    dealt = []
    for rank in range(size):
        dealt.append(world_of(rank, size).share(batches))
    assert {len(part) for part in dealt} == {-(-n // size)}
    assert sorted(batch.n_tokens for part in dealt for batch in part if batch is not None) == list(range(n))
    for rank, part in enumerate(dealt):  # `loop._chance` counts on these numbers
        assert [b.n_tokens for b in part if b is not None] == list(range(rank, n, size))
