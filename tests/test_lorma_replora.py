"""LoRMA multiplies a weight, and RepLoRA's networks make a LoRA: both against their papers' formulas, written out."""

from __future__ import annotations

import pytest
import torch
from exact import Exact, draw
from torch.nn import functional as F

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.nn.linear import Linear
from edgelora.peft.inject import inject
from edgelora.peft.methods import METHODS

RANK, ALPHA = 4, 6.0


def moved(method, weight, seed=3):
    """A layer over `weight` with the method's delta, whose every number was moved."""
    linear = Linear(weight)
    linear.delta = METHODS[method].fresh(weight, RANK, ALPHA, torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for i, parameter in enumerate(linear.delta.parameters()):
            parameter += 0.3 * draw(*parameter.shape, seed=seed + i)
    return linear


def test_lorma_multiplies_the_weight():
    weight, x = Exact(draw(7, 5)), draw(11, 5, seed=1)
    linear = moved("lorma", weight)
    a, b = linear.delta.lora_A, linear.delta.lora_B
    multiplied = (torch.eye(7, dtype=torch.float64) + ALPHA / RANK * b @ a) @ weight.values
    torch.testing.assert_close(linear(x), F.linear(x, multiplied))
    wanted = torch.autograd.grad(F.linear(x, multiplied).square().sum(), [a, b])
    torch.testing.assert_close(torch.autograd.grad(linear(x).square().sum(), [a, b]), wanted)


def test_lorma_keeps_no_dequantized_weight():
    weight, x = Exact(draw(7, 5)), draw(11, 5, seed=1).requires_grad_()
    linear, kept = moved("lorma", weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        y = linear(x).sum()
    assert (7, 5) not in kept
    weight.times = 0
    y.backward()
    assert weight.times == 2  # for the gradients of x and of A


def test_replora_is_a_lora_that_two_networks_make():
    weight, x = Exact(draw(7, 5)), draw(11, 5, seed=1)
    linear = moved("replora", weight)
    delta = linear.delta
    a, bt = (
        F.gelu(delta.P @ of.hidden + of.bias) / 2 @ of.out  # √r is 2
        for of in (delta.of_A, delta.of_B)
    )
    wanted = x @ weight.values.T + ALPHA / RANK * (x @ a.T) @ bt
    torch.testing.assert_close(linear(x), wanted)
    saved = delta.tensors()
    torch.testing.assert_close(saved["lora_B"] @ saved["lora_A"], (bt.T @ a).detach())


def test_replora_begins_with_an_a_as_large_as_a_loras(tiny):
    decoder = build_decoder(open_base(tiny.path))
    sizes = {}
    for method in ("lora", "replora"):
        inject(decoder, method, 16, 32, seed=0)
        sizes[method] = [float(linear.delta.factors.a.norm().detach()) for linear in decoder.linears.values()]
    assert sizes["replora"] == pytest.approx(sizes["lora"], rel=0.25)


def test_every_network_of_replora_learns_from_the_second_step_on():
    """At first B is zero, and with it the gradients of all but what makes B."""
    linear = Linear(Exact(draw(7, 5)))
    linear.delta = METHODS["replora"].fresh(linear.weight, RANK, ALPHA, torch.Generator().manual_seed(1)).double()
    optimizer, x = torch.optim.SGD(linear.delta.parameters(), lr=0.1), draw(11, 5, seed=1)
    still = {}
    for step in (1, 2):
        optimizer.zero_grad()
        (linear(x) - 1).square().mean().backward()
        still[step] = {name for name, parameter in linear.delta.named_parameters() if not parameter.grad.any()}
        optimizer.step()
    assert still[1] == {"P", "of_A.hidden", "of_A.bias", "of_A.out", "of_B.hidden", "of_B.bias"}
    assert still[2] == set()
