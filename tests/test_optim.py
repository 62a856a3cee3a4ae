"""Optimizers, schedules, moving averages and noise, against torch, transformers, bitsandbytes and the papers' lines."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import subprocess
import sys
from typing import get_args

import pytest
import torch

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import Objective, Optimizer, Schedule, TrainConfig
from edgelora.errors import ConfigError, FileFormatError
from edgelora.peft.defaults import NO_SOURCE
from edgelora.peft.inject import inject
from edgelora.peft.methods import METHODS, pair
from edgelora.peft.targets import Where
from edgelora.training import offloaded_adamw, optim
from edgelora.training.adafactor import Adafactor
from edgelora.training.defaults import choose
from edgelora.training.ema import Ema
from edgelora.training.lion import Lion
from edgelora.training.neftune import neftune
from edgelora.training.offloaded_adamw import OffloadedAdamW
from edgelora.training.optim import OPTIMIZERS, build_optimizer, clip, flatten_state, load_state, set_share
from edgelora.training.schedule import share_at
from edgelora.training.settle import settle

OWN_SCALE = ["vera", "glora", "houlsby", "galore"]  # of which galore alone has one
# They have A and B, and something beside them; or take a share of a LoRA's rate, and say so.
WITH_A_AND_B = ["dora", "multilora", "molora", "full", "galore"]
HERE = [name for name in OPTIMIZERS if name != "adamw8bit"]  # those that run without a graphics card


def config_of(**settings):
    return TrainConfig(base="-", data="-", out="-", **{"learning_rate": 0.01, **settings})


def named(seed=0):
    """Parameters of a DoRA by name: two matrices (one starts at zero, as B does) and a vector."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "q.delta.lora_A": torch.randn(4, 6, generator=generator),
        "q.delta.lora_B": torch.zeros(5, 4),
        "q.delta.lora_magnitude_vector": torch.rand(5, generator=generator) + 1,
    }
    return [(name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items()]


def steps(optimizer, parameters, n, seed=3):
    """`n` steps down seeded gradients of very different sizes; some of the rest is skipped, as a frozen part is."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        for name, parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10 ** (i % 4 - 2)
            if "magnitude" in name and i == 1:
                parameter.grad = None
        optimizer.step()


def values(parameters):
    return [parameter.detach().clone() for _, parameter in parameters]


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"atol": 1e-6, "rtol": 1e-5}))


# -- each optimizer against its oracle ----------------------------------------------------------------------------


def test_the_table_is_that_of_the_config():
    assert set(OPTIMIZERS) == set(get_args(Optimizer))


def test_adamw_is_that_of_torch():
    ours, theirs = named(), named()
    steps(build_optimizer(ours, config_of(beta1=0.8, beta2=0.95)), ours, 6)
    reference = [parameter for _, parameter in theirs]
    steps(torch.optim.AdamW(reference, lr=0.01, betas=(0.8, 0.95), weight_decay=0, foreach=False), theirs, 6)
    assert_same(ours, theirs)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_that_of_transformers_as_its_trainer_sets_it(decay):
    from transformers.optimization import Adafactor as Theirs

    ours, theirs = named(), named()
    steps(Adafactor(ours, lr=0.01, weight_decay=decay), ours, 6)
    reference = [parameter for _, parameter in theirs]
    settings = {"scale_parameter": False, "relative_step": False, "weight_decay": decay}
    steps(Theirs(reference, lr=0.01, **settings), theirs, 6)
    assert_same(ours, theirs)


def test_adafactor_moves_a_matrix_that_begins_at_zero():
    """What torch's own does a thousand times more slowly."""
    parameters = named()
    steps(build_optimizer(parameters, config_of(optimizer="adafactor")), parameters, 1)
    root_mean_square = values(parameters)[1].square().mean().sqrt()
    assert math.isclose(root_mean_square, 0.01, rel_tol=0.3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_is_that_of_the_paper(decay):
    ours, theirs = named(), named()
    beta1, beta2, rate = 0.9, 0.99, 0.01
    steps(Lion(ours, rate, (beta1, beta2), decay), ours, 6)

    class Paper:
        """Algorithm 2 of arXiv:2302.06675, line by line."""

        moments: dict = {}  # noqa: RUF012

        @torch.no_grad()
        def step(self):
            for name, p in theirs:
                if p.grad is not None:
                    m = self.moments.get(name, torch.zeros_like(p))
                    c = beta1 * m + (1 - beta1) * p.grad
                    p.copy_(p - rate * (c.sign() + decay * p))
                    self.moments[name] = beta2 * m + (1 - beta2) * p.grad

    steps(Paper(), theirs, 6)
    assert_same(ours, theirs)


def test_lion_is_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    ours, theirs = named(), named()
    steps(Lion(ours, 0.01), ours, 6)
    steps(bitsandbytes.optim.Lion32bit([parameter for _, parameter in theirs], lr=0.01), theirs, 6)
    assert_same(ours, theirs)


@pytest.mark.parametrize(("name", "beta2"), [("adamw", 0.999), ("lion", 0.99)])
def test_a_beta_that_is_left_open_is_the_papers(name, beta2):
    config = config_of(optimizer=name, beta1=0.8).model_copy(update={"beta2": None})
    assert {group["betas"] for group in build_optimizer(named(), config).param_groups} == {(0.8, beta2)}


# -- groups -------------------------------------------------------------------------------------------------------


def rates(optimizer):
    return {
        name.rpartition(".")[2]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_b_learns_faster_under_loraplus():
    config = config_of(method="loraplus", loraplus_ratio=8, weight_decay=0.1)
    assert rates(build_optimizer(named()[:2], config)) == {"lora_A": (0.01, 0.1), "lora_B": (0.08, 0.1)}


@pytest.mark.parametrize("method", ["lora", "longlora"])
def test_matrices_that_are_trained_whole_beside_a_lora_learn_a_tenth_as_fast(tiny, method):
    """As full fine-tuning trains them; vectors as a LoRA, which is what trains them alone."""
    decoder, base = build_decoder(open_base(tiny.path)), open_base(tiny.path)
    saved = () if method == "longlora" else ("norm", "down_proj", "lm_head")
    inject(decoder, method, 2, 4, seed=0, targets=Where(modules_to_save=saved))
    asked = config_of(method=method, modules_to_save=saved, base_dtype="f32")
    found = {name: rate for name, (rate, _) in rates(build_optimizer(decoder.named_parameters(), asked)).items()}
    assert found == {"lora_A": 0.01, "lora_B": 0.01, "delta": pytest.approx(1e-3), "weight": 0.01}
    told = settle(asked, base, 10**10).choices
    assert told["whole_learning_rate"].value == "0.001"
    assert "LoRA Without Regret" in told["whole_learning_rate"].why
    for other in ({"method": "lora", "modules_to_save": ("norm",)}, {"method": "full", "modules_to_save": ()}):
        assert "whole_learning_rate" not in settle(asked.model_copy(update=other), base, 10**10).choices


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.faster])
def test_all_matrices_learn_as_fast_and_lengths_do_not_decay(method):
    found = rates(build_optimizer(named(), config_of(method=method, weight_decay=0.1)))
    of_vectors = 0.0025 if METHODS[method].projects else 0.01  # GaLore's α, which is still to multiply the others
    assert found == {"lora_A": (0.01, 0.1), "lora_B": (0.01, 0.1), "lora_magnitude_vector": (of_vectors, 0.0)}


def test_a_share_of_the_peak_is_a_share_in_every_group():
    optimizer = build_optimizer(named(), config_of(method="loraplus", loraplus_ratio=8))
    for share in (0.5, 0.25):
        set_share(optimizer, share)
        assert {rate for rate, _ in rates(optimizer).values()} == {share * 0.01, share * 0.08}


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.rows])
def test_every_parameter_of_a_method_is_in_one_group(tiny, method):
    decoder = build_decoder(open_base(tiny.path))
    parameters = inject(decoder, method, 2, 4, seed=0)
    optimizer = build_optimizer(decoder.named_parameters(), config_of(method=method, weight_decay=0.1))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in parameters)


# -- a state that goes on where it was ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dora", "loraplus"])
@pytest.mark.parametrize("name", HERE)
def test_a_resumed_optimizer_is_the_uninterrupted_one_bit_for_bit(name, method):
    config = config_of(optimizer=name, method=method, weight_decay=0.1)
    whole = named()
    optimizer = build_optimizer(whole, config)
    steps(optimizer, whole, 3)
    kept = {key: tensor.clone() for key, tensor in flatten_state(optimizer).items()}
    again = [(key, torch.nn.Parameter(parameter.detach().clone())) for key, parameter in whole]
    steps(optimizer, whole, 3, seed=4)

    resumed = build_optimizer(again, config)
    load_state(resumed, kept)
    steps(resumed, again, 3, seed=4)
    assert_same(whole, again, atol=0, rtol=0)
    ours, theirs = flatten_state(optimizer), flatten_state(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.mark.parametrize("name", HERE)
def test_a_state_is_named_tensors_of_what_has_been_trained(name):
    parameters = named()
    optimizer = build_optimizer(parameters, config_of(optimizer=name))
    assert flatten_state(optimizer) == {}
    steps(optimizer, parameters[:2], 2)
    assert {key.rpartition(".")[0] for key in flatten_state(optimizer)} == {key for key, _ in parameters[:2]}


def test_a_state_that_is_loaded_is_a_copy():
    parameters = named()
    optimizer = build_optimizer(parameters, config_of())
    steps(optimizer, parameters, 2)
    kept = {key: tensor.clone() for key, tensor in flatten_state(optimizer).items()}
    load_state(optimizer, kept)
    before = copy.deepcopy(kept)
    steps(optimizer, parameters, 1)
    assert all(torch.equal(kept[key], before[key]) for key in kept)


def test_eight_bit_moments_come_back_too():
    """On the CPU, where bitsandbytes has the same state without the paging."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")

    def made():
        generator = torch.Generator().manual_seed(0)
        small, large = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 4), (64, 128)))
        parameters = [("small", small), ("large", large)]
        return parameters, bitsandbytes.optim.AdamW8bit([{"params": parameters, "initial_lr": 1e-3}])

    whole, optimizer = made()
    steps(optimizer, whole, 3)
    kept = {key: tensor.clone() for key, tensor in flatten_state(optimizer).items()}
    assert kept["large.state1"].dtype == torch.uint8
    assert kept["small.step"].dtype == torch.int64
    resumed, other = made()
    with torch.no_grad():
        for (_, a), (_, b) in zip(resumed, whole, strict=True):
            a.copy_(b)
    load_state(other, kept)
    steps(optimizer, whole, 2, seed=4)
    steps(other, resumed, 2, seed=4)
    assert_same(whole, resumed, atol=0, rtol=0)


def test_moments_are_paged_again_after_loading():
    """Loading puts them on the card; the optimizer's own buffers are where they can be moved away."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    parameters = [("large", torch.nn.Parameter(torch.ones(64, 128)))]
    optimizer = bitsandbytes.optim.AdamW8bit([{"params": parameters}])
    steps(optimizer, parameters, 1)
    kept = {key: tensor.clone() for key, tensor in flatten_state(optimizer).items()}
    buffers = []

    def buffer(parameter, dtype):
        buffers.append(torch.zeros_like(parameter, dtype=dtype))
        return buffers[-1]

    optimizer.get_state_buffer, optimizer.is_paged = buffer, True
    load_state(optimizer, kept)
    state = optimizer.state[parameters[0][1]]
    for key, own in zip(("state1", "state2"), buffers, strict=True):
        assert state[key] is own
        assert torch.equal(own, kept[f"large.{key}"])


def test_the_state_of_another_run_is_refused():
    parameters = named()
    optimizer = build_optimizer(parameters, config_of())
    steps(optimizer, parameters, 1)
    with pytest.raises(FileFormatError) as e:
        load_state(build_optimizer(parameters[1:], config_of()), flatten_state(optimizer))
    assert str(e.value).splitlines() == [
        "the optimizer's state has 3 tensors of parameters that are not trained here",
        "  why: the first is q.delta.lora_A.step: it was kept by a run with other settings",
        "  fix: resume with the settings of that run, or start a new one",
    ]


def test_eight_bits_on_a_cpu_are_refused_with_what_to_take():
    with pytest.raises(ConfigError) as e:
        build_optimizer(named(), config_of(optimizer="adamw8bit"))
    assert str(e.value).splitlines() == [
        "optimizer adamw8bit: there is no CUDA device in this run",
        "  why: it saves a graphics card's memory: moments in 8 bits, moved to the machine's own when space is short",
        "  fix: take --optimizer adamw, or adafactor where memory is short",
    ]


def test_eight_bits_without_bitsandbytes_are_refused_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda _: None)
    parameter = type("OnACard", (), {"device": torch.device("cuda")})()
    with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
        OPTIMIZERS["adamw8bit"]([{"params": [("q.lora_A", parameter)]}], config_of(optimizer="adamw8bit"))


# -- schedules ----------------------------------------------------------------------------------------------------

THEIRS = {
    "linear": ("get_linear_schedule_with_warmup", {}),
    "cosine": ("get_cosine_schedule_with_warmup", {}),
    "constant": ("get_constant_schedule_with_warmup", {}),
    "wsd": ("get_wsd_schedule", {"num_decay_steps": 20, "decay_type": "1-sqrt"}),
}


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_behind_the_warm_up_a_schedule_is_that_of_transformers(schedule, warmup):
    from transformers import optimization

    name, settings = THEIRS[schedule]
    if schedule != "constant":
        settings = {**settings, "num_training_steps": 100}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = getattr(optimization, name)(optimizer, num_warmup_steps=warmup, **settings)
    wanted = [theirs.lr_lambdas[0](step) for step in range(warmup, 100)]
    assert [share_at(schedule, step, 100, warmup, 0.2) for step in range(warmup, 100)] == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_the_warm_up_learns_from_its_first_step_and_ends_at_the_peak(schedule):
    assert [share_at(schedule, step, 100, 4, 0.2) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert share_at(schedule, 4, 100, 4, 0.2) == 1.0


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 10, 1000])
@pytest.mark.parametrize("decay", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_no_step_of_a_run_of_any_length_is_lost(schedule, total, warmup, decay):
    shares = [share_at(schedule, step, total, warmup, decay) for step in range(total)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) == 1.0
    peak = shares.index(1.0)
    assert peak <= max(0, total // 2 - 1)  # a warm-up takes at most half of a short run
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


def test_linear_is_the_schedule_that_runs_had():
    """(total − step) / (total − warmup), to the last bit."""
    for step in range(5, 37):
        assert share_at("linear", step, 37, 5, 0.2) == (37 - step) / (37 - 5)


def test_wsd_stays_until_its_last_fifth():
    shares = [share_at("wsd", step, 50, 5, 0.2) for step in range(50)]
    assert set(shares[5:41]) == {1.0}
    assert shares[41] == 1 - math.sqrt(1 - (50 - 41) / 10)


# -- the moving average -------------------------------------------------------------------------------------------


def test_the_average_is_the_weighted_mean_of_what_was_seen():
    parameters = named()
    ema, decay, seen = Ema(parameters, 0.9), 0.9, []
    for step in range(5):
        with torch.no_grad():
            for _, parameter in parameters:
                parameter += step + 1
        ema.update()
        seen.append(values(parameters))
    weights = [decay ** (4 - i) for i in range(5)]
    for i, (name, _) in enumerate(parameters):
        wanted = sum(w * v[i] for w, v in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(ema.state()[name], wanted)


def test_the_start_is_no_part_of_the_average():
    parameters = named()
    ema = Ema(parameters, 0.999)
    with torch.no_grad():
        parameters[1][1].fill_(7)
    ema.update()
    assert torch.equal(ema.state()["q.delta.lora_B"], torch.full((5, 4), 7.0))


def test_swapped_shows_the_average_and_gives_the_weights_back_after_a_fault_too():
    parameters = named()
    ema = Ema(parameters, 0.5)
    optimizer = build_optimizer(parameters, config_of())
    for _ in range(3):
        steps(optimizer, parameters, 1)
        ema.update()
    before, averages = values(parameters), {k: v.clone() for k, v in ema.state().items()}
    with ema.swapped():
        shown = values(parameters)
    with pytest.raises(RuntimeError), ema.swapped():
        parameters[0][1].backward()  # no graph: whatever fails in here
    assert all(torch.equal(a, averages[name]) for a, (name, _) in zip(shown, parameters, strict=True))
    assert not torch.equal(shown[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(before, values(parameters), strict=True))
    assert all(torch.equal(v, averages[k]) for k, v in ema.state().items())
    steps(optimizer, parameters, 1)  # what is trained is still what the model computes with
    assert not torch.equal(before[0], values(parameters)[0])


def test_a_resumed_average_is_the_uninterrupted_one_bit_for_bit():
    parameters = named()
    whole, optimizer = Ema(parameters, 0.9), build_optimizer(parameters, config_of())
    steps(optimizer, parameters, 1)
    whole.update()
    resumed = Ema(parameters, 0.9)
    resumed.load({name: tensor.clone() for name, tensor in whole.state().items()})
    for _ in range(3):
        steps(optimizer, parameters, 1)
        whole.update()
        resumed.update()
    assert whole.state().keys() == resumed.state().keys()
    assert all(torch.equal(whole.state()[name], tensor) for name, tensor in resumed.state().items())


# -- NEFTune ------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_paper_in_every_segment():
    lengths, d, alpha = [3, 1, 500], 64, 5.0
    x = torch.randn(sum(lengths), d, generator=torch.Generator().manual_seed(0))
    noise = neftune(x, lengths, alpha, torch.Generator().manual_seed(1)) - x
    uniform = torch.empty(x.shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    for length, part, drawn in zip(lengths, noise.split(lengths), uniform.split(lengths), strict=True):
        bound = alpha / math.sqrt(length * d)
        torch.testing.assert_close(part, drawn * bound, atol=1e-6, rtol=0)
        assert float(part.abs().max()) <= bound + 1e-6
    # uniform in ±b has the deviation b / √3, and this many draws tell it within a percent
    assert float(noise[4:].std()) == pytest.approx(alpha / math.sqrt(500 * d) / math.sqrt(3), rel=0.01)
    assert abs(float(noise[4:].mean())) < 1e-3


def test_noise_is_decided_by_its_generator_and_goes_on():
    x = torch.zeros(6, 4)
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    a, b = (neftune(x, [2, 4], 5.0, first) for _ in range(2))
    assert torch.equal(a, neftune(x, [2, 4], 5.0, second))
    assert torch.equal(b, neftune(x, [2, 4], 5.0, second))
    assert not torch.equal(a, b)


def test_no_noise_is_no_change():
    x = torch.randn(6, 4)
    assert torch.equal(neftune(x, [2, 4], 0.0, torch.Generator()), x)


# -- what is chosen -----------------------------------------------------------------------------------------------


def chosen(n_weights, **settings):
    config, choices = choose(config_of(learning_rate=None, **settings), int(n_weights))
    return config, choices


@pytest.mark.parametrize(
    ("n_weights", "rate"),
    [(135e6, 1e-3), (0.99e9, 1e-3), (1.2e9, 2e-4), (8e9, 2e-4), (13e9, 2e-4), (14.8e9, 1e-4), (65e9, 1e-4)],
)
def test_the_learning_rate_falls_with_the_size(n_weights, rate):
    config, choices = chosen(n_weights)
    assert (config.rank, config.alpha, config.learning_rate) == (16, 32, rate)
    assert choices["learning_rate"].value == f"{rate:g}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_choice_has_a_source(method, objective, optimizer):
    for n_weights in (135e6, 8e9, 70e9):
        config, choices = chosen(n_weights, method=method, objective=objective, optimizer=optimizer)
        of_ranks = {"rank", "alpha"} if METHODS[method].ranked else set()
        assert set(choices) == {"learning_rate", *of_ranks}
        assert config.rank
        assert config.alpha
        assert all(choice.why for choice in choices.values())
        assert re.search(
            r"arXiv|github|PEFT|Regret|Unsloth|learned the most of those tried", choices["learning_rate"].why
        )
        for name, choice in choices.items():
            assert float(choice.value) == getattr(config, name)
        TrainConfig.model_validate(config.model_dump())  # what was chosen could have been given


def test_what_is_given_is_kept_and_not_explained():
    config, choices = choose(config_of(rank=64, alpha=7), 10**9)
    assert (config.rank, config.alpha, config.learning_rate) == (64, 7, 0.01)
    assert choices == {}


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.ranked])
@pytest.mark.parametrize("given", [{"rank": 4}, {"alpha": 3}, {"rank": 4, "alpha": 3}], ids=str)
def test_a_rank_is_refused_where_there_is_none(method, given):
    with pytest.raises(ConfigError) as e:
        chosen(8e9, method=method, **given)
    options = [f"--{name} {value}" for name, value in given.items()]
    assert e.value.what == f"--method {method} {' '.join(options)}: it has neither a rank nor an α"
    assert all(f"--{name}" in e.value.fix for name in given)


def test_scales_agree_at_the_chosen_rank_and_follow_each_methods_rule_elsewhere():
    def scale(method, rank):
        alpha = chosen(8e9, method=method, rank=rank)[0].alpha
        return alpha / (rank**0.5 if method == "rslora" else rank)

    ranked = [name for name, row in METHODS.items() if row.ranked and name not in OWN_SCALE]
    assert {scale(method, 16) for method in ranked} == {2.0}
    assert [scale(method, 64) for method in ("lora", "rslora", "loraplus", "dora")] == [0.5, 1.0, 0.5, 2.0]


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.shapes is not pair])
def test_who_trains_no_a_and_b_does_not_take_a_loras_rate_for_its_own(method):
    why = chosen(8e9, method=method)[1]["learning_rate"].why
    assert why.startswith(chosen(8e9)[1]["learning_rate"].why) == (method in WITH_A_AND_B)
    if why.startswith(NO_SOURCE):
        assert chosen(8e9, method=method)[0].learning_rate == chosen(8e9)[0].learning_rate


def test_a_vera_takes_more_ranks():
    config, choices = chosen(8e9, method="vera")
    assert (config.rank, config.alpha) == (256, 1.0)
    assert "none" in choices["alpha"].why


def test_loraplus_slows_a_as_much_as_it_speeds_b():
    assert chosen(8e9, method="loraplus")[0].learning_rate == 5e-5  # 2e-4 / √16
    assert chosen(8e9, method="loraplus", loraplus_ratio=4)[0].learning_rate == 1e-4


def test_an_adalora_takes_larger_steps_and_token_rows_those_of_embeddings():
    rates = {method: [chosen(size, method=method)[0].learning_rate for size in (135e6, 8e9)] for method in METHODS}
    assert rates["adalora"] == pytest.approx([9 * rate for rate in rates["lora"]])
    assert rates["token_rows"][0] == rates["prompt_tuning"][0] == 3e-2


def test_preferences_and_lion_take_smaller_steps():
    assert chosen(8e9, objective="dpo")[0].learning_rate == 5e-6
    assert chosen(8e9, objective="orpo")[0].learning_rate == 8e-5
    assert chosen(8e9, optimizer="lion")[0].learning_rate == 4e-5


# -- what a run imports -------------------------------------------------------------------------------------------

STEP = """
import sys
import torch
from edgelora.config import TrainConfig
from edgelora.training.optim import build_optimizer, flatten_state, load_state
parameter = torch.nn.Parameter(torch.zeros(2, 2))
config = TrainConfig(base="-", data="-", out="-", learning_rate=0.1, optimizer=sys.argv[1])
optimizer = build_optimizer([("lora_A", parameter)], config)
parameter.grad = torch.ones(2, 2)
optimizer.step()
optimizer.zero_grad()
load_state(optimizer, flatten_state(optimizer))
assert parameter.abs().sum() > 0
sys.exit(" ".join(name for name in ("torch._dynamo", "sympy") if name in sys.modules) or 0)
"""


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_a_step_does_without_torchs_compiler(name):
    done = subprocess.run([sys.executable, "-c", STEP, name], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_gradients_in_one_tensor_are_cut_by_their_length_together():
    """As torch cuts them one by one; a tensor that has other parts too is not touched but for these."""
    draw = torch.Generator().manual_seed(0)

    def parameters(others, in_one):
        made = [torch.nn.Parameter(torch.zeros(size)) for size in ((3, 4), (7,), (2, 2))]
        flat = torch.randn(23 + others, generator=draw.manual_seed(0))
        for parameter, part in zip(made, flat.split([12, 7, 4, *[others] * (others > 0)]), strict=False):
            parameter.grad = part.view(parameter.shape) if in_one else part.view(parameter.shape).clone()
        return made, flat

    for most in (0.5, 100.0):
        for others in (0, 5):
            (one, flat), (several, before) = parameters(others, True), parameters(others, False)
            assert clip(one, most) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(several, most)))
            for a, b in zip(one, several, strict=True):
                torch.testing.assert_close(a.grad, b.grad)
            assert torch.equal(flat[23:], before[23:])


class Stream:
    """Of a card that does at once what it is asked for."""

    def wait_stream(self, _): ...

    def wait_event(self, event):
        assert event == "gone"

    def record_event(self):
        return "gone"

    def synchronize(self): ...


def test_moments_that_travel_in_pieces_are_those_that_stay(monkeypatch):
    """Matrices that are longer than a piece, two groups, a step without a gradient, a state that is kept and put back;
    the streams of a card in tests/test_cuda.py."""
    monkeypatch.setattr(offloaded_adamw, "PIECE", 700)
    monkeypatch.setattr(offloaded_adamw, "_streams", lambda _: (Stream(), Stream()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def built(how):
        draw = torch.Generator().manual_seed(0)
        made = {str(n): torch.nn.Parameter(torch.randn(20, 10 + 25 * n, generator=draw)) for n in range(5)}
        named = list(made.items())
        groups = [{"params": named[:3], "lr": 1e-2}, {"params": named[3:], "lr": 4e-2, "weight_decay": 0.0}]
        return made, how(groups, weight_decay=0.1, fused=True)

    (stays, one), (travels, two) = built(torch.optim.AdamW), built(OffloadedAdamW)
    for step in range(6):
        draw = torch.Generator().manual_seed(step)
        grads = [torch.randn(parameter.shape, generator=draw) for parameter in stays.values()]
        for parameters, optimizer in ((stays, one), (travels, two)):
            for n, (parameter, grad) in enumerate(zip(parameters.values(), grads, strict=True)):
                parameter.grad = None if (n, step) == (3, 1) else grad.clone()
            optimizer.step()
        if step == 3:
            kept = {name: tensor.clone() for name, tensor in flatten_state(two).items()}
            for name, tensor in flatten_state(one).items():
                torch.testing.assert_close(tensor, kept[name], rtol=1e-6, atol=1e-9)
            load_state(two, kept)
    assert len(two._pieces) == 9  # 2100 and 4300 numbers
    assert [len(piece.parts) for piece in two._pieces][:3] == [2, 2, 1]
    for a, b in zip(stays.values(), travels.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
