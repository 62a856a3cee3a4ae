"""Adapters composed into one: held to PEFT's `add_weighted_adapter`, to llama.cpp's own blend, and to exact SVDs."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from same_tokens import IDS
from stirred import Stir
from test_export import make_adapter, make_dora

from converters import interference as meeting
from converters.adapter_to_gguf import write_adapter_gguf
from converters.compose import HOWS, WORKING_MATRICES, Part, Recipe, compose
from converters.task_tensors import kept_at_random
from edgelora.architectures.names import EMBEDDING
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import AdapterError, BaseModelError, ConfigError, OutputError
from edgelora.evaluate.fidelity import fidelity
from edgelora.peft.adapter import FILE_NAME, TENSORS, Adapter, LoraPair, read_adapter, write_adapter
from edgelora.peft.inject import attach
from edgelora.peft.kind import ROWS
from edgelora.pipeline.compose import ComposeOptions, compose_adapters
from edgelora.pipeline.task_scores import Task
from runtime.scorer import ScoringEngine

SHAPES = {"wide": (24, 16), "tall": (12, 24), "own": (10, 12)}  # (d_out, d_in); only the second adapter has `own`
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# -- PEFT is the oracle -------------------------------------------------------------------------------------------


def peft_model(*configs: dict) -> PeftModel:
    """A model of three linear layers with adapters `0`, `1` … of random A and B."""
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(d_in, d_out) for name, (d_out, d_in) in SHAPES.items()}
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    configs = [LoraConfig(init_lora_weights=False, **config) for config in configs]
    theirs = get_peft_model(model, configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        theirs.add_adapter(str(number), config)
    return theirs


def parts_of(theirs: PeftModel, weights: list[float]) -> list[Part]:
    """The same adapters as ours."""
    parts = []
    for number, weight in enumerate(weights):
        config, tensors = theirs.peft_config[str(number)], {}
        for name in SHAPES:
            layer = getattr(theirs.base_model.model, name)
            if str(number) in getattr(layer, "lora_A", {}):
                a, b = (getattr(layer, f"lora_{half}")[str(number)].weight for half in "AB")
                tensors[name] = {"lora_A": a.detach().numpy().copy(), "lora_B": b.detach().numpy().copy()}
        settings = {
            "peft_type": "LORA",
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
        }
        parts.append(Part(Adapter(settings, tensors), weight, str(number)))
    return parts


def changes_of(theirs: PeftModel, name: str) -> dict[str, np.ndarray]:
    layers = {module: getattr(theirs.base_model.model, module) for module in SHAPES}
    return {m: layer.get_delta_weight(name).detach().numpy() for m, layer in layers.items() if name in layer.lora_A}


def composed(parts: list[Part], recipe: Recipe, linears=SHAPES) -> dict[str, LoraPair]:
    return {module: found.pair for module, found in compose(parts, recipe, linears)}


ONE = {"r": 4, "lora_alpha": 6, "target_modules": ["wide", "tall"]}
TWO = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["wide", "tall", "own"]}
THREE = {"r": 3, "lora_alpha": 3, "target_modules": ["wide", "tall"]}


@pytest.mark.parametrize("weights", [[1.0, 0.5, 0.7], [1.0, -0.6, 0.3]], ids=["added", "taken away"])
@pytest.mark.parametrize("how", HOWS)
def test_each_way_is_pefts(how, weights, monkeypatch):
    third = {**THREE, "r": 4} if HOWS[how].factors else THREE  # unequal ranks where both take them
    theirs = peft_model(ONE, TWO, third)
    parts, recipe = parts_of(theirs, weights), Recipe(how, density=0.4, seed=3)
    masks = same_masks(parts, recipe)
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _: torch.from_numpy(next(masks)).float())
    theirs.add_weighted_adapter(["0", "1", "2"], weights, "all", HOWS[how].peft, density=0.4)
    found, wanted = composed(parts, recipe), changes_of(theirs, "all")
    assert set(found) == set(wanted) == set(SHAPES)
    for module, pair in found.items():
        assert abs(wanted[module]).max() > 0.05
        np.testing.assert_allclose(pair.b @ pair.a, wanted[module], atol=2e-6, rtol=2e-5, err_msg=module)
    assert next(masks, None) is None  # PEFT drew as many


def same_masks(parts: list[Part], recipe: Recipe):
    """What our DARE draws, in the order in which PEFT asks: by layer, then by tensor, then by adapter."""
    if recipe.way.thins != "random":
        return
    for module, (d_out, d_in) in SHAPES.items():
        having = [i for i, part in enumerate(parts) if module in part.adapter.tensors]
        draws = [np.random.default_rng([recipe.seed, i, zlib.crc32(module.encode())]) for i in having]
        rank = 4
        for shape in [(rank, d_in), (d_out, rank)] if recipe.way.factors else [(d_out, d_in)]:
            for draw in draws:
                yield kept_at_random(shape, recipe.density, draw)


@pytest.mark.parametrize("rank", [2, 7, 9])
def test_a_sum_cut_to_a_rank_is_pefts_svd(rank):
    theirs = peft_model(ONE, TWO, THREE)
    weights = [1.0, -0.5, 0.7]
    theirs.add_weighted_adapter(["0", "1", "2"], weights, "all", "svd", svd_rank=rank)
    wanted = changes_of(theirs, "all")
    for module, found in compose(parts_of(theirs, weights), Recipe(rank=rank), SHAPES):
        np.testing.assert_allclose(found.pair.b @ found.pair.a, wanted[module], atol=2e-6, rtol=2e-5, err_msg=module)
        assert found.pair.rank <= rank


# -- what holds for every way -------------------------------------------------------------------------------------


def random_part(rank: int, seed: int, linears=SHAPES, weight: float = 1.0) -> Part:
    draw = np.random.default_rng(seed)
    tensors = {
        name: {
            "lora_A": draw.normal(size=(rank, d_in)).astype(np.float32),
            "lora_B": draw.normal(size=(d_out, rank)).astype(np.float32),
        }
        for name, (d_out, d_in) in linears.items()
    }
    return Part(Adapter({"peft_type": "LORA", "r": rank, "lora_alpha": rank}, tensors), weight, f"adapter {seed}")


def test_a_sum_is_exact_at_all_ranks_together():
    one, two = random_part(3, 1, weight=0.5), random_part(5, 2, weight=-2.0)
    for module, pair in composed([one, two], Recipe()).items():
        wanted = sum(p.weight * p.adapter.pair(module).b @ p.adapter.pair(module).a for p in (one, two))
        assert pair.rank == 8
        np.testing.assert_allclose(pair.b @ pair.a, wanted, atol=1e-5)


def test_what_a_rank_leaves_out_is_measured():
    one, two = random_part(3, 1), random_part(5, 2)
    uncut = dict(compose([one, two], Recipe(), SHAPES))
    for module, found in compose([one, two], Recipe(rank=4), SHAPES):
        whole = sum(p.adapter.pair(module).b @ p.adapter.pair(module).a for p in (one, two))
        values = np.linalg.svd(whole, compute_uv=False)
        error = np.linalg.norm(whole - found.pair.b @ found.pair.a)
        assert error == pytest.approx(found.lost**0.5, rel=1e-4)
        assert error == pytest.approx(np.linalg.norm(values[4:]), rel=1e-4)  # Eckart–Young: none is better
        assert found.whole == pytest.approx(uncut[module].whole, rel=1e-5)
        assert found.whole == pytest.approx(np.sum(whole.astype(np.float64) ** 2), rel=1e-5)
        assert uncut[module].lost == 0


@pytest.mark.parametrize("how", [name for name in HOWS if name != "sum"])
def test_at_full_density_one_adapter_comes_out_as_it_is(how):
    part = random_part(4, 1)
    for module, pair in composed([part], Recipe(how, density=1.0)).items():
        own = part.adapter.pair(module)
        np.testing.assert_allclose(pair.b @ pair.a, own.b @ own.a, atol=1e-5)


@pytest.mark.parametrize("how", [name for name, way in HOWS.items() if way.thins == "random"])
def test_a_seed_decides_what_is_dropped(how):
    parts = [random_part(2, 1), random_part(2, 2)]
    first, again, other = (composed(parts, Recipe(how, seed=seed))["wide"] for seed in (0, 0, 1))
    assert np.array_equal(first.b, again.b)
    assert np.array_equal(first.a, again.a)
    assert not np.allclose(first.b @ first.a, other.b @ other.a)


def test_dare_drops_a_share_and_keeps_the_mean():
    mask = kept_at_random((1000, 1000), 0.3, np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.3, abs=3 * (0.3 * 0.7 / 1e6) ** 0.5)


@pytest.mark.parametrize("how", ["sum", "ties", "dare_ties"])
def test_one_layer_is_in_memory_at_a_time(how):
    """At most a matrix for each adapter and WORKING_MATRICES: as many layers as there are make no difference."""
    side, n_layers = 256, 12
    linears = {f"layer {i}": (side, side) for i in range(n_layers)}
    parts = [random_part(2, seed, linears) for seed in range(3)]
    kept = 0
    tracemalloc.start()
    for _, found in compose(parts, Recipe(how, rank=2), linears):
        kept += found.pair.a.nbytes + found.pair.b.nbytes  # the caller's, if it keeps them
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    matrix = 4 * side * side
    assert kept < matrix
    if how == "sum":
        assert peak < matrix  # factors alone
    else:
        assert peak < (len(parts) + WORKING_MATRICES) * matrix
        assert peak > len(parts) * matrix


# -- how adapters meet --------------------------------------------------------------------------------------------


def test_a_cosine_and_a_conflict_are_those_of_the_whole_changes(monkeypatch):
    monkeypatch.setattr(meeting, "ROWS", 5)
    one, two = (random_part(r, seed).adapter.pair("wide") for r, seed in ((3, 1), (5, 2)))
    a, b = one.b @ one.a, two.b @ two.a
    assert meeting.cosine(one, two) == pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
    assert meeting.conflict(one, two) == np.mean(a * b < 0)
    against = LoraPair(one.a, -2 * one.b)
    assert (meeting.cosine(one, one), meeting.cosine(one, against)) == (pytest.approx(1), pytest.approx(-1))
    assert (meeting.conflict(one, one), meeting.conflict(one, against)) == (0, 1)
    nothing = LoraPair(one.a, 0 * one.b)
    assert (meeting.cosine(one, nothing), meeting.conflict(one, nothing)) == (0, 0)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_left_vectors_are_those_of_an_svd(shape):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u = np.linalg.svd(weight.astype(np.float64), full_matrices=False)[0]
    for n in (None, 4):
        found = meeting.left_vectors(weight, n)
        np.testing.assert_allclose(np.abs(np.sum(found * u[:, :n], axis=0)), 1, atol=1e-9)


def test_an_intruder_is_a_strong_direction_between_those_of_the_weight():
    """On top of a diagonal weight, whose vectors are the axes: one direction halfway between all of them."""
    n = 64
    weight = np.diag(np.linspace(1, 2, n)).astype(np.float32)
    between = np.full((n, 1), n**-0.5, np.float32)
    own = meeting.left_vectors(weight)
    assert meeting.intruders(weight, own) == 0
    assert meeting.intruders(weight + 0.001 * between @ between.T, own) == 0  # too weak to turn any
    assert meeting.intruders(weight + 50 * between @ between.T, own) >= 1
    axis = np.eye(n, dtype=np.float32)[:, :1]
    assert meeting.intruders(weight + 50 * axis @ axis.T, own) == 0  # strong, and the weight's own


# -- the whole way ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """`one` of rank 4 on all layers, `two` of rank 2 on the attention's; `rows`: a task."""
    room = tmp_path_factory.mktemp("adapters")
    one, two = make_adapter(base, rank=4, seed=1), make_adapter(base, rank=2, seed=2, use_rslora=True)
    write_adapter(room / "one", one)
    write_adapter(room / "two", replace(two, tensors={m: t for m, t in two.tensors.items() if "attn" in m}))
    messages = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(3)]
    (room / "rows.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages), encoding="utf-8")
    return room


@pytest.fixture(scope="module")
def summed(tiny, folders):
    """0.8 × one − 0.5 × two, and what the command said of it, with every report."""
    out = folders / "both"
    options = ComposeOptions(Recipe(), report=True, tasks=[Task("say", folders / "rows.jsonl")])
    return compose_adapters(tiny.path, [(folders / "one", 0.8), (folders / "two", -0.5)], out, options)


def test_llama_cpp_computes_with_the_sum_what_it_blends_of_the_two(base, folders, summed, tmp_path):
    with ScoringEngine(base, n_ctx=64, n_sequences=1, threads=1) as engine:
        for folder in (folders / "one", folders / "two", summed.out):
            file = tmp_path / f"{folder.name}.gguf"
            write_adapter_gguf(file, read_adapter(folder, base.layers), base, folder.name, "F32")
            engine.load(folder.name, file)
        found = []
        for active in ({"one": 0.8, "two": -0.5}, {"both": 1.0}, {}):
            engine.use(active)
            found.append(engine.logits([IDS.tolist()], [list(range(len(IDS)))]))
    assert fidelity([found[:2]]).kl_mean <= 1e-6
    assert fidelity([found[::2]]).kl_mean > 1e-3


def test_peft_computes_with_the_folder_what_we_do(tiny, base, summed, transformers_model):
    theirs = PeftModel.from_pretrained(transformers_model(tiny), summed.out).eval()
    decoder = build_decoder(base)
    attach(decoder, read_adapter(summed.out, base.layers))
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0], atol=1e-4, rtol=1e-5)
    assert summed.ranks == {6: 8, 4: 6}  # both meet in two layers' four attention matrices


TWO_LAYERS = ("layers.0.self_attn.k_proj", "layers.1.mlp.down_proj")
OF_OURS = ["pissa", "olora", "vera", "adalora", "multilora", "lorma"]  # all that leave as B A in a way of their own


@pytest.fixture(scope="module")
def changes(tiny, base, transformers_model, tmp_path_factory):
    """`changes(name)`: a folder of such an adapter on two layers, and PEFT's own dense ΔW of each, float64."""
    room = tmp_path_factory.mktemp("kinds")

    def made(name):
        folder = room / name
        if name == "PEFT's AdaLoRA":
            torch.manual_seed(0)
            config = AdaLoraConfig(init_r=6, total_step=9, target_modules=[*TWO_LAYERS], init_lora_weights=False)
            get_peft_model(transformers_model(tiny), config).save_pretrained(folder)
        else:
            Stir(4, 6.0, by=0.4).on(base, name, TWO_LAYERS, folder)
        theirs = PeftModel.from_pretrained(transformers_model(tiny), folder).base_model.model
        return folder, {
            name: layer.get_delta_weight("default").detach().double().numpy()
            for name, layer in theirs.named_modules() if hasattr(layer, "get_delta_weight")
        }  # fmt: skip

    found = {}
    return lambda name: found.get(name) or found.setdefault(name, made(name))


@pytest.mark.parametrize("kind", [*OF_OURS, "PEFT's AdaLoRA"])
def test_an_adapter_of_any_method_that_is_b_a_is_composed_as_its_dense_change(tiny, base, changes, tmp_path, kind):
    """By rank-wise sum, and by TIES, which forms ΔW, both beside a plain LoRA: against PEFT's functions on dense ΔW."""
    (one, first), (two, second) = changes(kind), changes("lora")
    weights, density = [0.8, -0.5], 0.4
    for recipe in (Recipe(), Recipe("ties", density, rank=64)):
        out = tmp_path / recipe.how
        compose_adapters(
            tiny.path, [(one, weights[0]), (two, weights[1])], out, ComposeOptions(recipe, allow_unverified=True)
        )
        composed = read_adapter(out, base.layers)
        assert set(composed.tensors) == set(first) == set(second)
        for module in first:
            both = [first[module], second[module]]
            if recipe.how == "sum":
                wanted = weights[0] * both[0] + weights[1] * both[1]
            else:
                tensors = [torch.from_numpy(one) for one in both]
                wanted = merge_utils.ties(tensors, torch.tensor(weights, dtype=torch.float64), density).numpy()
                u, s, vt = np.linalg.svd(wanted, full_matrices=False)
                wanted = (u[:, :64] * s[:64]) @ vt[:64]
            pair = composed.pair(module)
            found = pair.b.astype(np.float64) @ pair.a
            assert np.linalg.norm(both[0]) > 0.01
            assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted), (recipe.how, module)
    assert read_adapter(tmp_path / "sum", base.layers).pair(next(iter(first))).rank > 4


def test_the_contract_says_what_it_is_made_of(base, summed):
    contract = read_adapter(summed.out, base.layers).contract
    assert contract.base == base.fingerprint
    assert contract.method == "compose"
    assert contract.certificate is None
    assert contract.training["recipe"] == {"how": "sum", "density": 0.5, "rank": None, "seed": 0}
    made = contract.training["made_from"]
    assert [(part["name"], part["weight"], part["method"]) for part in made] == [
        ("one", 0.8, "lora"), ("two", -0.5, "lora")
    ]  # fmt: skip
    assert len({part["sha256"] for part in made}) == 2


def test_the_report_says_where_they_meet(summed, base):
    assert [layer.module for layer in summed.layers] == list(base.linears)
    for layer in summed.layers:
        assert len(layer.meetings) == ("attn" in layer.module)
        assert set(layer.intruders) == {"one", "composed"} | ({"two"} if "attn" in layer.module else set())
        for met in layer.meetings:
            assert abs(met.cosine) < 0.2  # drawn independently
            assert met.conflict == pytest.approx(0.5, abs=0.1)


def test_every_model_is_scored_on_every_task(summed):
    assert [(score.task, score.model) for score in summed.scores] == [
        ("say", "base"), ("say", "one"), ("say", "two"), ("say", "composed")
    ]  # fmt: skip
    assert len({score.loss for score in summed.scores}) == 4
    assert all(score.n_rows == 3 and np.isfinite(score.loss) for score in summed.scores)


def test_the_command_writes_json_and_tables(tiny, folders, tmp_path, capsys):
    words = ["compose", str(tiny.path), "--adapter", f"{folders / 'one'}:0.5", "--adapter", str(folders / "two")]
    words += ["--how", "ties", "--density", "0.2", "--report"]
    assert run([*words, "--out", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == {"4": 14}
    assert 0 < found["lost"] < 1
    assert len(found["interference"]) == 14
    assert run([*words, "--out", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines() if line.strip()[:1].isdigit()] == ["0", "1"]
    assert "next:" in shown.err
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (Recipe("ties", density=0.0), "--density 0"),
        (Recipe("ties", density=1.5), "--density 1.5"),
        (Recipe("ties", density=float("nan")), "--density nan"),
        (Recipe("slerp"), "--how slerp"),
        (Recipe(rank=0), "--rank 0"),
        (Recipe(rank=13), "--rank 13: tall is (12, 24); own is (10, 12)"),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe, what):
    with pytest.raises(ConfigError) as e:
        composed([random_part(2, 1), random_part(2, 2)], recipe)
    assert e.value.what == what


@pytest.mark.parametrize("how", [name for name, way in HOWS.items() if way.factors])
def test_factors_of_unequal_ranks_are_refused_with_a_way_that_takes_them(how):
    parts = [random_part(2, 1), random_part(3, 2)]
    with pytest.raises(AdapterError) as e:
        composed(parts, Recipe(how))
    assert "wide has 2 in adapter 1, 3 in adapter 2; tall has" in e.value.what
    other = e.value.fix.split()[2].rstrip(",")
    assert composed(parts, Recipe(other))


def test_adapters_that_never_meet_can_only_be_summed():
    one, two = random_part(2, 1, {"wide": SHAPES["wide"]}), random_part(3, 2, {"tall": SHAPES["tall"]})
    with pytest.raises(AdapterError) as e:
        composed([one, two], Recipe("ties"))
    assert str(e.value).splitlines() == [
        "adapter 1 and adapter 2: they have no layer in common",
        "  why: ties settles what adapters do to the same weights, and these never meet",
        "  fix: pass --how sum, which is exact for them",
    ]
    assert {module: pair.rank for module, pair in composed([one, two], Recipe()).items()} == {"wide": 2, "tall": 3}


def test_a_dora_is_refused(tiny, base, folders, tmp_path):
    write_adapter(tmp_path / "dora", make_dora(base))
    with pytest.raises(AdapterError, match="dora: it cannot be composed") as e:
        compose_adapters(
            tiny.path, [(folders / "one", 1.0), (tmp_path / "dora", 1.0)], tmp_path / "x", ComposeOptions()
        )
    assert "merge" in e.value.fix


def test_an_alora_and_rows_of_tokens_are_refused_by_what_they_are(tiny, base, folders, tmp_path):
    write_adapter(tmp_path / "waits", make_adapter(base, alora_invocation_tokens=[5]))
    rows = Adapter(
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3]},
        {EMBEDDING: {ROWS: np.ones((1, 256), np.float32)}},
        make_adapter(base).contract,
    )
    write_adapter(tmp_path / "rows", rows)
    for name, why, fix in (("waits", "from its invocation on", "export"), ("rows", EMBEDDING, "merge")):
        with pytest.raises(AdapterError, match=f"{name}: it cannot be composed") as e:
            compose_adapters(
                tiny.path, [(folders / "one", 1.0), (tmp_path / name, 1.0)], tmp_path / "x", ComposeOptions()
            )
        assert why in e.value.why
        assert fix in e.value.fix


def test_all_that_cannot_be_composed_are_named_at_once(base):
    parts = []
    for method in ("lora", "houlsby", "layernorm"):
        _, adapter = Stir(rank=2, alpha=2.0, by=0.1).on(base, method)
        parts.append(Part(adapter, 1.0, method))
    with pytest.raises(AdapterError) as e:
        next(compose(parts, Recipe(), base.linears))
    assert e.value.what == "houlsby: it cannot be composed; layernorm: it cannot be composed"
    assert "houlsby: it adds a small nonlinear network" in e.value.why
    assert "layernorm: it changes model.layers.0.input_layernorm" in e.value.why
    assert "--in torch" in e.value.fix  # no merge can hold the one
    assert "edgelora merge" in e.value.fix


def test_a_density_that_nothing_uses_is_refused(tiny, folders, tmp_path, capsys):
    words = ["compose", str(tiny.path), "--adapter", str(folders / "one"), "--out", str(tmp_path / "x")]
    assert run([*words, "--density", "0.2"]) == 1
    assert "error: --density 0.2 with --how sum" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def damaged(folder, base, change):
    adapter = make_adapter(base, seed=3)
    change(adapter.tensors["model.layers.0.mlp.up_proj"])
    write_adapter(folder, adapter)
    return folder


def test_what_is_wrong_with_an_adapter_is_said(tiny, base, make_tiny, folders, tmp_path):
    def refused(*adapters, base_path=tiny.path, out=tmp_path / "x", **options):
        with pytest.raises((AdapterError, ConfigError, OutputError, BaseModelError)) as e:
            compose_adapters(base_path, [(path, 1.0) for path in adapters], out, ComposeOptions(**options))
        assert not (tmp_path / "x").exists()
        return e.value.what

    one, two = folders / "one", folders / "two"
    other = make_tiny(seed=9).path
    assert f"{one} does not belong to {other}" in refused(one, two, base_path=other)
    nan = damaged(tmp_path / "nan", base, lambda parts: parts["lora_A"].__setitem__((0, 0), np.nan))
    assert "model.layers.0.mlp.up_proj: it holds NaN or infinite values" in refused(one, nan)
    assert "named twice" in refused(one, one)
    assert "nothing to compose" in refused()
    with pytest.raises(ConfigError, match="two:0: nothing of it would be in the result"):
        compose_adapters(tiny.path, [(one, 1.0), (two, 0.0)], tmp_path / "x", ComposeOptions())
    assert "exists already" in refused(one, two, out=two)
    assert "it would be written over" in refused(one, two, out=two, overwrite=True)
    (two_unsigned := tmp_path / "unsigned").mkdir()
    for file in two.iterdir():
        if file.name != FILE_NAME:
            (two_unsigned / file.name).write_bytes(file.read_bytes())
    assert "it does not say which base it belongs to" in refused(one, two_unsigned)


def test_without_a_contract_goes_in_comes_out_without_one(tiny, folders, tmp_path):
    (tmp_path / "two").mkdir()
    for file in (folders / "two").iterdir():
        if file.name != FILE_NAME:
            (tmp_path / "two" / file.name).write_bytes(file.read_bytes())
    made = compose_adapters(
        tiny.path, [(folders / "one", 1.0), (tmp_path / "two", 1.0)], tmp_path / "x",
        ComposeOptions(allow_unverified=True),
    )  # fmt: skip
    assert not (tmp_path / "x" / FILE_NAME).exists()
    assert "--allow-unverified-base" in made.notes[0]
