"""Hitting a size: the knapsack against brute force, and a plan's way from a target to a file."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, write_tiny
from gguf.constants import GGMLQuantizationType as Type

from converters.budget import Choice, least_bytes, least_damage
from converters.candidates import CANDIDATES
from converters.imatrix import Importance, write_importance
from converters.plan import QuantizeOptions, plan_types, read_plan
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.cli.budget import size_bytes
from edgelora.errors import ConfigError, DataError, OutputError
from edgelora.files.adapter_check import check_adapter
from edgelora.files.gguf import GGUFFile
from edgelora.pipeline.budget import MISS, Attempt, BudgetOptions, Target, quantize_to, reach
from edgelora.pipeline.prepared import Prepared
from edgelora.pipeline.quantize import QuantizeSettings, quantize
from edgelora.pipeline.repair import Repair
from edgelora.progress import silent
from runtime.scorer import ScoringEngine

KINDS = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def drawn(seed: int) -> dict[str, list[Choice]]:
    """Up to seven tensors with up to five choices each; bytes and damage fall on few values, so that there are ties."""
    draw = np.random.default_rng(seed)
    return {
        f"t{i}": [
            Choice(KINDS[j], int(draw.integers(1, 12)), float(draw.integers(0, 9)) / 10)
            for j in range(draw.integers(1, 6))
        ]
        for i in range(draw.integers(1, 8))
    }


def totals(taken: list[Choice] | tuple[Choice, ...]) -> tuple[int, float]:
    return sum(c.size_bytes for c in taken), sum(c.damage for c in taken)


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_is_as_good_as_brute_force(seed):
    choices = drawn(seed)
    every = [totals(taken) for taken in itertools.product(*choices.values())]
    for limit in {size for size, _ in every}:
        size, damage = totals(list(least_damage(choices, limit).values()))
        assert size <= limit
        assert damage == pytest.approx(min(d for s, d in every if s <= limit), abs=1e-9)
    for limit in {round(damage, 6) + 1e-9 for _, damage in every}:
        size, damage = totals(list(least_bytes(choices, limit).values()))
        assert damage <= limit * (1 + 1e-9)
        assert size == min(s for s, d in every if d <= limit)


def test_a_model_of_many_alike_tensors_is_solved_exactly():
    """As large as a real one: 7 matrices in 30 layers and an embedding, 10 types, ratios that hardly differ.

    The oracle is the textbook's dynamic programme over every number of bytes (in units of all sizes' divisor).
    """
    draw = np.random.default_rng(0)
    sizes = {
        f"{i}.{name}": blocks for i in range(30) for name, blocks in zip("qkvogud", (3, 1, 1, 3, 6, 6, 6), strict=True)
    }
    sizes["embedding"] = 192
    per_block = [66, 74, 82, 84, 98, 110, 136, 144, 176, 210]
    choices = {}
    for name, blocks in sizes.items():
        curve = draw.lognormal(0, 0.4) * blocks**0.5
        choices[name] = [
            Choice(Type.Q4_K, blocks * b, curve * 4 ** (-b / 32) * draw.uniform(0.9, 1.1)) for b in per_block
        ]
    limit = int(sum(sizes.values()) * 140.3)
    best = np.zeros(limit // 2 + 1)  # by the units there are: the least damage of the tensors so far
    for given in choices.values():
        ways = []
        for choice in given:
            units = choice.size_bytes // 2
            ways.append(np.concatenate((np.full(units, np.inf), best[:-units] + choice.damage)))
        best = np.min(ways, 0)
    size, damage = totals(list(least_damage(choices, limit).values()))
    assert size <= limit
    assert damage == pytest.approx(best[-1], rel=1e-9)


def test_what_cannot_be_reached_is_said():
    choices = {"a": [Choice(Type.Q2_K, 4_000_000, 0.5), Choice(Type.Q6_K, 9_000_000, 0.1)]}
    with pytest.raises(ConfigError, match=r"3\.99 MB are too few") as too_small:
        least_damage(choices, 3_990_000)
    assert "4.00 MB" in too_small.value.why
    with pytest.raises(ConfigError, match=r"a KL of 0\.05 is out of reach") as too_good:
        least_bytes(choices, 0.05)
    assert "0.1" in too_good.value.why


HOME = ROOT / "examples" / "home" / "train.jsonl"


@pytest.fixture(scope="module")
def source(tmp_path_factory, vocabulary):
    """A model of its own, and a home of its own: what was measured is kept there from test to test."""
    folder = tmp_path_factory.mktemp("budget")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_HOME", str(folder / "home"))
        yield write_tiny(folder / "tiny-F16.gguf", vocabulary, Type.F16).path


@pytest.fixture
def quick(monkeypatch):
    """Without the types whose tables ggml takes 6 s to make: a search finds its way among the others all the same."""
    kinds = tuple(kind for kind in CANDIDATES if not kind.name.startswith(("IQ2", "IQ3")))
    monkeypatch.setattr("converters.candidates.CANDIDATES", kinds)


def test_a_size_is_hit_with_measured_types(source, tmp_path):
    costs = []
    options = BudgetOptions(data=HOME, plan_out=tmp_path / "plan.toml")
    stock = plan_types(source, QuantizeOptions("Q4_K_M")).file_bytes
    reached = quantize_to(source, tmp_path / "out.gguf", Target(size_bytes=stock), options, costs.append)
    assert [cost.evaluations for cost in costs] in ([], [15])  # 7 matrices in 2 layers and the embedding
    written = GGUFFile(tmp_path / "out.gguf")
    assert stock - 4096 < written.size_bytes == reached.size_bytes == reached.plan.file_bytes <= stock
    assert {name: info.type for name, info in written.tensors.items()} == reached.plan.types
    assert read_plan(tmp_path / "plan.toml").types == reached.plan.types
    assert 0 < reached.kl < 0.1
    assert reached.as_dict()["attempts"][0]["predicted_kl"] == pytest.approx(reached.kl, rel=1)
    # what was measured is not measured again, and the plan can be edited and used
    again = quantize_to(
        source, tmp_path / "more.gguf", Target(size_bytes=stock + 40_000), options_of(HOME), costs.append
    )
    assert len(costs) <= 1
    assert again.size_bytes > reached.size_bytes
    assert again.attempts[0].predicted_kl < reached.attempts[0].predicted_kl
    settings = QuantizeSettings(plan=tmp_path / "plan.toml", imatrix=tmp_path / "plan.imatrix.gguf")
    quantize(source, tmp_path / "by-plan.gguf", settings=settings)
    by_plan = GGUFFile(tmp_path / "by-plan.gguf")
    for name in written.tensors:
        np.testing.assert_array_equal(by_plan.rows(name), written.rows(name))


def options_of(data, **others):
    return BudgetOptions(data=data, **others)


@pytest.mark.usefixtures("quick")
def test_a_kl_is_reached_by_measuring_what_was_written(source, tmp_path):
    reached = quantize_to(source, tmp_path / "out.gguf", Target(kl=0.002), options_of(HOME))
    assert reached.kl == reached.taken.measured.kl_mean <= 0.002
    assert reached.size_bytes == reached.taken.file_bytes
    if not reached.notes:
        assert reached.kl >= (1 - MISS) * 0.002
    smaller = quantize_to(source, tmp_path / "smaller.gguf", Target(kl=20), options_of(HOME))
    assert smaller.size_bytes < reached.size_bytes
    assert len(smaller.attempts) == 1  # no plan is smaller
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{name}.{end}" for name in ("out", "smaller") for end in ("gguf", "certificate.json")
    }


@dataclass(frozen=True)
class Steps:
    """Stands for a measured model: plans by the limit of damages from which on they are chosen, and the KL of each."""

    kls: dict[float, float]
    written: list[float] = field(default_factory=list)

    def damages(self):
        return min(self.kls), max(self.kls)

    def within_damage(self, limit):
        chosen = max(at for at in self.kls if at <= limit)
        return SimpleNamespace(types={"a": chosen})

    def attempt(self, plan, draft, _):
        at = plan.types["a"]
        draft.write_text(str(at))
        self.written.append(at)
        return Attempt(round(1000 - list(self.kls).index(at)), at, SimpleNamespace(kl_mean=self.kls[at]))


@pytest.mark.parametrize(
    ("kls", "target", "stands", "most"),
    [
        ({0.0: 0.0, 1e-6: 2.9e-6, 1.2e-5: 3.2e-5, 1e-4: 4.1e-5}, 1e-5, 1e-6, 4),  # nothing lies between the two
        ({0.0: 0.0, 0.01: 0.03, 0.1: 0.3}, 1e-9, 0.0, 3),  # only the model itself: a KL of 0 is no divisor
        ({0.0: 0.0, 0.01: 0.03, 0.1: 0.3}, 20.0, 0.1, 1),  # everything is within it
        ({0.01: 0.3, 0.02: 0.4}, 0.015, 0.01, 2),  # nothing is: the nearest
        ({i / 1000: i / 400 for i in range(200)}, 0.05, 0.019, 6),  # damages are off by a factor alone
        ({i / 1000: (i / 200) ** 2 for i in range(200)}, 0.05, 0.044, 6),  # and by more than a factor
    ],
)
def test_the_search_keeps_the_smallest_plan_within_a_kl(kls, target, stands, most, tmp_path):
    steps, draft = Steps(kls), tmp_path / "draft.gguf"
    tried = list(reach(steps, Target(kl=target), draft, silent))
    assert len(set(steps.written)) == len(steps.written) == len(tried) <= most  # no plan twice
    kept = float(draft.read_text())
    inside = [a for _, a in tried if a.measured.kl_mean <= target]
    if inside:
        assert kept == max(inside, key=lambda a: a.predicted_kl).predicted_kl
    else:
        assert kept == min((a for _, a in tried), key=lambda a: a.measured.kl_mean).predicted_kl
    assert kls[kept] == pytest.approx(kls[stands], rel=MISS)
    assert list(tmp_path.iterdir()) == [draft]


REPAIRED = ("out-repair.gguf", "out-repair.certificate.json")


@pytest.mark.usefixtures("quick")
def test_a_repair_is_held_against_the_same_bytes_as_bits(source, tmp_path):
    stock = plan_types(source, QuantizeOptions("Q3_K_M")).file_bytes
    out = tmp_path / "out.gguf"
    reached = quantize_to(source, out, Target(size_bytes=stock), options_of(HOME, repair_rank=4))
    assert reached.repair is not None
    assert reached.repair.kl_with < reached.repair.kl_without == reached.kl
    assert reached.repair.kept == (reached.repair.kl_with < reached.repair.kl_bits)
    assert not replace(reached.repair, kl_with=0.2, kl_without=0.1, kl_bits=0.3).kept  # worse than nothing
    beside = tmp_path / "out-repair.gguf"
    assert beside.exists() == reached.repair.kept
    expected = {"out.gguf", "out.certificate.json", *(REPAIRED if reached.repair.kept else [])}
    assert {file.name for file in tmp_path.iterdir()} == expected


@pytest.mark.usefixtures("quick")
def test_a_repair_that_beats_bits_stays_beside_the_file(source, tmp_path, monkeypatch):
    """Bits are made to lose; the file is one that llama.cpp's checks take, for these very tensors."""
    monkeypatch.setattr(Repair, "kept", property(lambda _: True))
    stock = plan_types(source, QuantizeOptions("Q3_K_M")).file_bytes
    reached = quantize_to(source, tmp_path / "out.gguf", Target(size_bytes=stock), options_of(HOME, repair_rank=4))
    beside = tmp_path / "out-repair.gguf"
    assert reached.repair is not None
    assert beside.stat().st_size == reached.repair.size_bytes
    shapes = {name: info.shape for name, info in GGUFFile(source).tensors.items()}
    check_adapter(beside, "llama", shapes)
    card = json.loads((tmp_path / "out-repair.certificate.json").read_text())
    assert card["passed"]
    assert list(card["files"]) == ["out-repair.gguf"]
    base = open_base(tmp_path / "out.gguf")
    with ScoringEngine(base, n_ctx=64) as engine:  # says which base it belongs to
        engine.load("repair", beside)
    assert {file.name for file in tmp_path.iterdir()} == {"out.gguf", "out.certificate.json", *REPAIRED}


def test_targets_that_cannot_be_are_refused(source, tmp_path, make_tiny):
    for wrong in ({}, {"size_bytes": 10**6, "kl": 0.1}, {"kl": -1.0}):
        with pytest.raises(ConfigError):
            Target(**wrong)
    target, out = Target(kl=0.01), tmp_path / "out.gguf"
    with pytest.raises(ConfigError, match="nothing to measure on"):
        quantize_to(source, out, target, BudgetOptions())
    few = tmp_path / "few.txt"
    few.write_text("Just a few words. " * 28, encoding="utf-8")  # some 300 tokens
    with pytest.raises(DataError, match="too few to measure on"):
        quantize_to(source, out, target, BudgetOptions(text=few))
    with pytest.raises(OutputError, match="Q8_0 already"):
        quantize_to(make_tiny(Type.Q8_0).path, out, target, options_of(HOME))
    with pytest.raises(ConfigError, match="are too few for these weights"):
        quantize_to(source, out, Target(size_bytes=100_000), options_of(HOME))
    assert sorted(tmp_path.iterdir()) == [few]


@pytest.mark.usefixtures("quick")
def test_the_command_says_what_it_reached(source, tmp_path, capsys):
    out, size = tmp_path / "out.gguf", plan_types(source, QuantizeOptions("Q4_K_M")).file_bytes
    words = ["quantize", str(source), str(out), "--target-size", f"{size / 1e6 + 0.01:.2f}MB", "--data", str(HOME)]
    assert run([*words, "--save-plan", str(tmp_path / "plan.toml"), "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["size_bytes"] == out.stat().st_size <= size + 15_000
    assert result["certificate"]["passed"]
    assert "held-out tokens" in said.err
    assert f"KL {result['kl']:.4g}" in " ".join(said.err.split())
    assert {file.name for file in tmp_path.iterdir()} == {
        "out.gguf", "out.certificate.json", "plan.toml", "plan.imatrix.gguf",
    }  # fmt: skip


def test_what_cannot_be_is_refused_before_anything_is_measured(source, tmp_path, monkeypatch):
    def measured(*_):
        raise AssertionError("it was measured")

    out = tmp_path / "out.gguf"
    monkeypatch.setattr("edgelora.pipeline.prepared.sensitivities", measured)
    with pytest.raises(ConfigError, match="are too few for these weights"):
        quantize_to(source, out, Target(size_bytes=100_000), options_of(HOME))
    monkeypatch.setattr("edgelora.pipeline.prepared.read_calibration", measured)
    for rank in (0, 129):  # keys and values are 128 × 256
        with pytest.raises(ConfigError, match=f"--repair {rank}"):
            quantize_to(source, out, Target(kl=0.1), options_of(HOME, repair_rank=rank))
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_what_it_is_made_from(source, tmp_path):
    whole = source.read_bytes()
    for out, options in (
        (source, options_of(HOME, overwrite=True)),
        (tmp_path / "out.gguf", options_of(HOME, overwrite=True, plan_out=source)),
    ):
        with pytest.raises(OutputError, match="written over"):
            quantize_to(source, out, Target(kl=0.1), options)
    assert source.read_bytes() == whole


def test_importance_that_saw_what_is_held_out_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr("edgelora.pipeline.prepared.sensitivities", lambda *_: {})
    columns = {t.name: t.shape[1] for t in plan_types(source, QuantizeOptions("Q4_K_M")).tensors if len(t.shape) == 2}
    sums = {name: np.ones((1, n), np.float32) for name, n in columns.items()}
    for names, said in (((HOME.name,), 1), (("other.txt",), 0)):
        seen = tmp_path / f"{names[0]}.gguf"
        write_importance(seen, Importance(sums, {name: np.full(1, 64) for name in sums}, 1, 64, names))
        notes = Prepared.read(source, options_of(HOME, imatrix=seen)).notes
        assert len(notes) == said
        assert all("was computed on train.jsonl too" in note for note in notes)


@pytest.mark.parametrize(("text", "size"), [("90MB", 90e6), ("90mb", 90e6), ("1.5 GiB", 1.5 * 2**30), ("2gb", 2e9)])
def test_a_size_is_a_number_and_a_unit(text, size):
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["abc", "90", "0MB", "90 Mbit", ""])
def test_what_is_no_size_names_its_option(text, capsys):
    assert run(["quantize", "in.gguf", "out.gguf", "--target-size", text]) == 2
    assert "--target-size" in (said := capsys.readouterr().err)
    assert "no size" in said


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("quantize in.gguf out.gguf Q4_K_M --target-size 90MB", "TYPE"),
        ("quantize in.gguf out.gguf --target-kl 0.02 --pure", "--pure"),
        ("quantize in.gguf out.gguf --target-kl 0.02 --data rows.jsonl --check-rows 8", "--check-rows"),
        ("quantize in.gguf out.gguf Q4_K_M --repair 8", "--repair"),
        ("quantize in.gguf --target-kl 0.02", "OUT"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(line, named, capsys):
    assert run(line.split()) == 2
    assert named in capsys.readouterr().err
