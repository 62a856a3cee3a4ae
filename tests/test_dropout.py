"""Dropout before A, for every row of METHODS that has it: PEFT's with the same masks, and nothing where it measures."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from exact import Exact
from exact import draw as numbers
from peft import LoraConfig, PeftModel, get_peft_model
from pefts import gradients_of
from same_tokens import IDS, loss_of
from test_methods import stir

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.nn.dropped import Drop, dropped_lora, parted
from edgelora.nn.linear import Factors, Linear
from edgelora.peft.adapter import PREFIX, TENSORS, Adapter, write_adapter
from edgelora.peft.dropout import DroppedDelta, bare, draw
from edgelora.peft.inject import adapter_config, collect, inject
from edgelora.peft.methods import METHODS
from edgelora.peft.strength import require_taken
from edgelora.peft.targets import Where
from edgelora.training.loop import _chance
from edgelora.training.run import run_training
from edgelora.training.world import Alone

# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK, ALPHA, P = 4, 6, 0.3
INVOKED = tuple(IDS[8:10].tolist())
DROPS = [name for name, row in METHODS.items() if row.drops]
OWN_START = ["pissa", "olora"]  # PEFT subtracts their start from the base
AS_PEFT = ["lora", "rslora", "loraplus", "loftq", "dora", "vera", "dylora", "alora"]  # what is trained is in the file


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def where_of(method, p=P):
    return Where(lora_dropout=p, alora_invocation_tokens=INVOKED if METHODS[method].waits else ())


def learned(base, method, p=P):
    """A decoder whose adapter is away from its start."""
    decoder = build_decoder(base)
    inject(decoder, method, RANK, ALPHA, 0, where_of(method, p))
    stir(decoder)
    return decoder


def deltas_of(decoder):
    return [linear.delta for linear in decoder.linears.values()]


def drawn(decoder, seed=3):
    draw(deltas_of(decoder), torch.Generator().manual_seed(seed))
    return decoder


# -- PEFT is the oracle -------------------------------------------------------------------------------------------


class Masked(torch.nn.Module):
    """In the place of PEFT's dropout: the mask that our layer has, of the last tokens where PEFT gives it no others."""

    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return x * self.drop(torch.ones(len(IDS), x.shape[-1]))[-x.shape[-2] :]


def mask(theirs, decoder, setting):
    """Give a PEFT model our masks."""
    for name, linear in decoder.linears.items():
        dropouts = getattr(theirs.get_submodule(f"{PREFIX}{name}"), setting)
        assert dropouts["default"].p == P
        dropouts["default"] = Masked(linear.delta.drop)
    return theirs.train()


@pytest.mark.parametrize("method", [name for name in DROPS if name not in OWN_START])
def test_peft_with_the_same_masks_computes_the_same(base, tiny, transformers_model, tmp_path, method):
    decoder = learned(base, method)
    config = adapter_config(decoder, method, RANK, ALPHA, "-", where_of(method))
    write_adapter(tmp_path / "mine", Adapter(config, collect(decoder)))
    theirs = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine", is_trainable=True)
    mask(theirs, drawn(decoder), METHODS[method].drops)
    found, loss = theirs(input_ids=IDS[None], labels=IDS[None]), loss_of(decoder)
    torch.testing.assert_close(loss, found.loss, atol=1e-5, rtol=0)
    if method in AS_PEFT:
        loss.backward()
        found.loss.backward()
        wanted = gradients_of(theirs)
        for name, parameter in decoder.named_parameters():
            assert parameter.grad.any()
            torch.testing.assert_close(
                parameter.grad, wanted[name.replace(".delta.inner", "")], atol=1e-5, rtol=1e-4, msg=name
            )


@pytest.mark.parametrize("method", OWN_START)
def test_a_base_that_keeps_its_weights_learns_as_pefts_that_lost_the_start(base, tiny, transformers_model, method):
    decoder = build_decoder(base)
    inject(decoder, method, RANK, ALPHA, 0, where_of(method))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=P, init_lora_weights=method)
    theirs = get_peft_model(transformers_model(tiny), config)
    pairs = dict(theirs.named_parameters())
    own = {name: [pairs[f"{PREFIX}{name}.lora_{part}.default.weight"] for part in "AB"] for name in decoder.linears}
    for name, linear in decoder.linears.items():
        for part, value in zip("AB", own[name], strict=True):
            getattr(linear.delta.inner, f"start_{part}").copy_(value.detach())
    stir(decoder)
    with torch.no_grad():
        for name, linear in decoder.linears.items():
            for part, value in zip("AB", own[name], strict=True):
                value += getattr(linear.delta.inner, f"moved_{part}")
    mask(theirs, drawn(decoder), "lora_dropout")
    found, loss = theirs(input_ids=IDS[None], labels=IDS[None]), loss_of(decoder)
    torch.testing.assert_close(loss, found.loss, atol=1e-5, rtol=0)
    loss.backward()
    found.loss.backward()
    for name, linear in decoder.linears.items():
        for part, value in zip("AB", own[name], strict=True):
            moved = getattr(linear.delta.inner, f"moved_{part}")
            torch.testing.assert_close(moved.grad, value.grad, atol=1e-5, rtol=1e-3)


# -- what holds for every method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DROPS)
def test_it_leaves_something_out_while_it_is_drawn_and_only_then(base, method):
    decoder, plain = learned(base, method), learned(base, method, p=0.0)
    assert all(isinstance(delta, DroppedDelta) for delta in deltas_of(decoder))
    measured = plain.logits(IDS)
    assert torch.equal(decoder.logits(IDS), measured)
    once, again, other = (drawn(decoder, seed).logits(IDS) for seed in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.equal(once, measured)
    assert not torch.equal(once, other)
    draw(deltas_of(decoder), None)
    assert torch.equal(decoder.logits(IDS), measured)


@pytest.mark.parametrize("method", DROPS)
def test_under_it_a_start_is_the_bases_but_for_those_that_stand_in_the_weight(base, method):
    decoder, plain = build_decoder(base), build_decoder(base)
    inject(decoder, method, RANK, ALPHA, 0, where_of(method))
    apart = (drawn(decoder).logits(IDS) - plain.logits(IDS)).abs().max()
    assert apart > 0.1 if METHODS[method].starts_in_weight else apart < 2e-5, apart


def kept_bytes(linear, x):
    """What the graph of a layer keeps for its backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = linear(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", DROPS)
def test_a_plan_of_the_memory_holds_with_it(base, method, dtype):
    """The mask is not kept, nor what it leaves of x."""
    decoder = learned(base, method)
    linear = decoder.linears["model.layers.0.mlp.up_proj"]
    x = numbers(32, 256, dtype=dtype, grad=True)
    if decoder.awake is not None:
        decoder.awake.rows = torch.ones(len(x), 1)
    kept = kept_bytes(linear, x)
    assert kept >= x.nbytes
    drawn(decoder)
    assert kept_bytes(linear, x) <= kept


@pytest.mark.parametrize("method", DROPS)
def test_layers_that_are_computed_again_see_the_same(base, method):
    decoder = drawn(learned(base, method))
    gradients = []
    for decoder.recompute in (False, True):
        decoder.zero_grad()
        loss_of(decoder).backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("method", [name for name in DROPS if name != "dora"])  # whose lengths are constants
def test_the_gradient_is_that_of_the_function(method):
    linear = Linear(Exact(numbers(7, 5)))
    fresh = METHODS[method].fresh(linear.weight, 3, 4.0, torch.Generator().manual_seed(1)).double()
    linear.delta = DroppedDelta(fresh, 0.4)
    linear.delta.drop = Drop(0.4, 12)
    names, start = zip(*linear.named_parameters(), strict=True)
    inputs = [numbers(4, 5, seed=2), *(one.detach() + numbers(*one.shape, seed=3) for one in start)]

    def function(x, *values):
        return torch.func.functional_call(linear, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, [one.requires_grad_() for one in inputs], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [None, torch.tensor([[0.0], [1.0], [0.0], [1.0]])], ids=["all tokens", "some"])
def test_the_gradient_of_some_tokens_is_that_of_the_function(rows):
    inputs = [numbers(4, 5, seed=1, grad=True), numbers(3, 5, seed=2, grad=True), numbers(7, 3, seed=3, grad=True)]

    def function(x, a, b):
        return dropped_lora(x, Exact(numbers(7, 5)), Factors(a, b, 1.5), Drop(0.4, 12), rows)

    assert torch.autograd.gradcheck(function, inputs)


def test_the_parts_of_x_are_what_they_say_and_read_the_weight_once():
    x, a, b = numbers(4, 5, seed=1, grad=True), numbers(3, 5, seed=2, grad=True), numbers(7, 3, seed=3, grad=True)
    weight, drop = Exact(numbers(7, 5)), Drop(0.4, 12)

    def function(*inputs):
        return parted(inputs[0], weight, Factors(*inputs[1:], 1.5), drop)

    seen, left_out = function(x, a, b)
    assert weight.times == 1
    torch.testing.assert_close(seen, drop(x) @ (weight.values + 1.5 * b @ a).T)
    torch.testing.assert_close(left_out, (x - drop(x)) @ weight.values.T)
    assert torch.autograd.gradcheck(function, (x, a, b))


def test_a_mask_is_the_same_however_its_numbers_lie():
    drop, x = Drop(0.4, 12), torch.ones(5, 4)
    assert torch.equal(drop(x), drop(torch.ones(4, 5).T))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DROPS])
def test_a_method_without_it_says_who_has_it(method):
    with pytest.raises(ConfigError, match=f"lora_dropout: nothing that --method {method} could use") as caught:
        require_taken(METHODS[method], Where(lora_dropout=0.1))
    assert caught.value.fix == f"leave it out, or take --method {', '.join(DROPS)}"


# -- in a run -----------------------------------------------------------------------------------------------------


def test_masks_are_each_layers_and_each_micro_batches_own(base):
    decoder = learned(base, "lora")
    x, seen = torch.ones(40, 256), []
    for seed in (1, 1, 2):
        drawn(decoder, seed)
        seen.append([delta.drop(x) for delta in deltas_of(decoder)])
    assert all(map(torch.equal, seen[0], seen[1]))
    assert not any(map(torch.equal, seen[0], seen[2]))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen[0], 2))
    share = float(torch.cat(seen[0]).eq(0).float().mean())
    assert share == pytest.approx(P, abs=0.01)  # of 143,360 numbers: 8 deviations
    assert float(torch.cat(seen[0]).max()) == pytest.approx(1 / (1 - P))
    draw(deltas_of(decoder), None)
    assert all(delta.factors is not None for delta in deltas_of(decoder))


def test_what_a_micro_batch_leaves_out_is_drawn_beside_what_its_method_draws(base):
    decoder = learned(base, "dylora")
    deltas, seen = deltas_of(decoder), []
    for step, micro in ((0, 0), (0, 1), (1, 0)):
        job = SimpleNamespace(config=SimpleNamespace(neftune_alpha=0.0, seed=0), world=Alone(), decoder=decoder,
                              method=METHODS["dylora"], deltas=deltas)  # fmt: skip
        with _chance(job, SimpleNamespace(step=step, micro=micro)):
            seen.append(deltas[0].drop)
            assert len({bare(delta).active for delta in deltas}) == 1
            assert bare(deltas[0]).active is not None
        assert all(delta.drop is None and bare(delta).active is None for delta in deltas)
    assert len({drop.seed for drop in seen}) == 3


def test_an_adalora_weighs_and_prunes_under_it_as_without(base):
    around, found = METHODS["adalora"].around, []
    for p in (0.0, P):
        decoder = learned(base, "adalora", p)
        loss_of(decoder).backward()
        around.regularize(deltas_of(decoder))
        around.allot(deltas_of(decoder), step=6, total=10)
        config = adapter_config(decoder, "adalora", RANK, ALPHA, "-", where_of("adalora", p))
        found.append((config.pop("lora_dropout"), config, [parameter.grad for parameter in decoder.parameters()]))
        assert any(bare(delta).pruned.any() for delta in deltas_of(decoder))
    (none, plain, gradients), (some, dropped, same) = found
    assert (none, some) == (0.0, P)
    assert plain == dropped
    assert all(map(torch.equal, gradients, same))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = '{{"messages": [{{"role": "user", "content": "{0}"}}, {{"role": "assistant", "content": "Hello {0}"}}]}}\n'
    path.write_text("".join(row.format(name) for name in ("A", "B", "C", "D")))
    return path


class Stopped(Exception):
    """What ends a run behind a step, as a fault of the program would."""


def test_a_run_that_goes_on_leaves_out_what_it_would_have(tiny, rows, tmp_path):
    def settings(name):
        return TrainConfig(base=tiny.path, data=rows, out=tmp_path / name, method="adalora", rank=4, max_steps=4,
                           batch_rows=2, lora_dropout=0.2, save_every=1, resume=True)  # fmt: skip

    def stop(progress):
        if progress.stage == "train" and progress.step == 3:
            raise Stopped

    run_training(settings("whole"))
    with pytest.raises(Stopped):
        run_training(settings("stopped"), stop)
    run_training(settings("stopped"))
    assert (tmp_path / "whole" / TENSORS).read_bytes() == (tmp_path / "stopped" / TENSORS).read_bytes()


@pytest.mark.parametrize(("method", "p"), [("pissa", 0.05), ("olora", 0.0), ("lora", 0.05)])
def test_that_it_blurs_a_start_is_told_once_before_the_first_step_and_kept(tiny, rows, tmp_path, method, p):
    heard = []
    config = TrainConfig(base=tiny.path, data=rows, out=tmp_path / "mine", method=method, lora_dropout=p, max_steps=1)
    run_training(config, lambda progress: heard.append(progress.stage), lambda name, _: heard.append(name))
    kept = json.loads((tmp_path / "mine.run" / "run.json").read_text())["choices"]
    blurred = method == "pissa"
    assert heard[: heard.index("train")].count("lora_dropout") == heard.count("lora_dropout") == blurred
    assert ("noise" in kept.get("lora_dropout", {}).get("why", "")) == blurred


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "ia3"), f"leave it out, or take --method {DROPS[0]}, {DROPS[1]}"),
        (("--objective", "dpo"), "lora_dropout with --objective dpo"),
    ],
    ids=" ".join,
)
def test_a_run_refuses_what_cannot_be(tiny, rows, tmp_path, capsys, words, said):
    out = tmp_path / "mine"
    assert run(["train", str(tiny.path), str(rows), "--out", str(out), "--lora-dropout", "0.1", *words]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()
