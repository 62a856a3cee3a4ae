"""GaLore against its paper's algorithm, written out in numpy with an SVD; what it keeps, and that it goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.peft.inject import inject
from edgelora.training import galore
from edgelora.training.optim import build_optimizer, flatten_state, load_state, set_share
from edgelora.training.settle import settle

SHAPES = {"tall.delta.delta": (12, 7), "wide.delta.delta": (7, 12), "norm.delta.weight": (7,)}
RATE, DECAY, BETAS = 0.05, 0.1, (0.8, 0.95)


def config_of(**settings):
    given = {"base": "-", "data": "-", "out": "-", "method": "galore", "learning_rate": RATE, "rank": 3, **settings}
    return TrainConfig(weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1], **given)


def named():
    return [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]


def target(name):
    return np.random.default_rng(len(name)).normal(size=SHAPES[name]).astype(np.float32)


def curvature(name):
    """Of a quadratic whose gradient is C ∘ (W − W*): its largest directions change on the way."""
    return np.random.default_rng(9).uniform(0.1, 2.0, SHAPES[name]).astype(np.float32)


def steps(optimizer, parameters, n):
    for _ in range(n):
        for name, parameter in parameters:
            gradient = curvature(name) * (parameter.detach().numpy() - target(name))
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()


def by_the_paper(name, n, gap, rank=3, scale=0.25):
    """Algorithm 2 of arXiv:2403.03507, with decoupled weight decay; plain AdamW for a vector, whose
    rate α multiplies too."""
    w = np.zeros(SHAPES[name])
    for t in range(n):
        g = curvature(name) * (w - target(name))
        if g.ndim == 2:
            if t % gap == 0:
                u, _, vt = np.linalg.svd(g, full_matrices=False)
                p = vt[:rank].T if g.shape[0] >= g.shape[1] else u[:, :rank]
                p = p * np.sign(p[np.abs(p).argmax(0), range(rank)])  # an SVD leaves signs open
            r = g @ p if g.shape[0] >= g.shape[1] else p.T @ g
        else:
            r = g
        if t == 0:
            m = v = np.zeros_like(r)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r**2
        moved = m / (1 - BETAS[0] ** (t + 1)) / (np.sqrt(v / (1 - BETAS[1] ** (t + 1))) + 1e-8)
        if g.ndim == 2:
            moved = moved @ p.T if g.shape[0] >= g.shape[1] else p @ moved
        w = (1 - RATE * (DECAY if g.ndim == 2 else 0.0)) * w - RATE * scale * moved
    return w


def test_it_takes_the_papers_steps():
    parameters = named()
    steps(
        build_optimizer(parameters, config_of(update_proj_gap=3)), parameters, 8
    )  # directions found anew behind 3 and 6
    for name, parameter in parameters:
        np.testing.assert_allclose(parameter.detach(), by_the_paper(name, 8, gap=3), rtol=1e-4, atol=1e-5)


def test_a_subspace_has_r_directions_and_the_result_has_them_all():
    (_, weight), *_ = parameters = named()
    optimizer = build_optimizer(parameters, config_of(update_proj_gap=4))
    steps(optimizer, parameters, 4)
    assert torch.linalg.matrix_rank(weight.detach()) == 3
    steps(optimizer, parameters, 16)
    assert torch.linalg.matrix_rank(weight.detach()) == 7


@pytest.mark.parametrize("rank", [1, 3, 7, 100])
def test_it_keeps_moments_of_r_directions_and_these(rank):
    parameters = named()
    optimizer = build_optimizer(parameters, config_of(rank=rank))
    steps(optimizer, parameters, 1)
    r = min(rank, 7)
    state = flatten_state(optimizer)
    sizes = {name: sum(t.numel() for key, t in state.items() if key.startswith(name)) for name in SHAPES}
    one = r * (2 * 12 + 7) + 1  # two moments, the projection of the shorter side, and the number of the step
    assert list(sizes.values()) == [one, one, 2 * 7 + 1]
    assert [galore.moments_of(shape, rank) + 1 for shape in SHAPES.values()] == list(sizes.values())


@pytest.mark.parametrize("at", [2, 4, 5])
def test_it_goes_on_bit_for_bit(at):
    """In the midst of a subspace, at its end, and behind its change: the projection is kept, too."""
    whole, config = named(), config_of(update_proj_gap=4)
    optimizer = build_optimizer(whole, config)
    steps(optimizer, whole, at)
    kept = {key: tensor.clone() for key, tensor in flatten_state(optimizer).items()}
    again = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in whole]
    resumed = build_optimizer(again, config)
    load_state(resumed, kept)
    for one, parameters in ((optimizer, whole), (resumed, again)):
        set_share(one, 0.5)
        steps(one, parameters, 5)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, again, strict=True))
    ours, theirs = flatten_state(optimizer), flatten_state(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_is_left_open_is_the_authors():
    optimizer = build_optimizer(named(), config_of(rank=None))
    assert (optimizer.rank, optimizer.scale, optimizer.gap) == (128, 0.25, 200)


def test_around_another_optimizer_it_is_refused(tiny):
    base = open_base(tiny.path)
    with pytest.raises(ConfigError) as e:
        settle(config_of(base=base.path, optimizer="lion"), base, 10**10)
    assert str(e.value).splitlines() == [
        "--optimizer lion with --method galore",
        "  why: GaLore is an optimizer itself: AdamW over projected gradients",
        "  fix: leave it out; --method full trains the same weights with any optimizer",
    ]


def test_its_rate_and_its_scale_come_to_that_of_full_fine_tuning(tiny):
    base = open_base(tiny.path)
    rates = {}
    for method in ("full", "galore"):
        config = settle(config_of(base=base.path, method=method, learning_rate=None, rank=None), base, 10**10).config
        decoder = build_decoder(base)
        inject(decoder, method, 2, 1.0, seed=0)
        found = build_optimizer(decoder.named_parameters(), config)
        rates[method] = {
            name: group["lr"] * (found.scale if group.get("projected") else 1)
            for group in found.param_groups for name in group["param_names"]
        }  # fmt: skip
    assert rates["galore"] == pytest.approx(rates["full"])
