"""PEFT as an oracle: its gradients beside ours, by the names of the layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgelora.nn.decoder import Decoder
from edgelora.peft.adapter import PREFIX


def gradients_of(theirs: nn.Module) -> dict[str, Tensor | None]:
    """Of what a PEFT model trains, by the names that ours have: without the adapter's, `weight` and the kind's own."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix(PREFIX).replace(".default", "").replace(".ln_tuning_layers", "")
            found[short if ".ln_tuning_layers" in name else short.removesuffix(".weight")] = parameter.grad
    return found


def require_pefts_gradients(decoder: Decoder, theirs: nn.Module, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    """After a backward pass of both: all trained tensors have gradients that are not zero, and the same."""
    gradients = gradients_of(theirs)
    ours = {name.replace(".delta", ""): parameter.grad for name, parameter in decoder.named_parameters()}
    assert set(ours) == set(gradients)
    for name, gradient in ours.items():
        assert gradient is not None, name
        assert gradient.any(), name
        torch.testing.assert_close(gradient, gradients[name], atol=atol, rtol=rtol, msg=name)
