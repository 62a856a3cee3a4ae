"""Decoders whose adapter has learned something, and packed rows to go backward through."""

from __future__ import annotations

import itertools

import torch

from edgelora.base.decoder import build_decoder
from edgelora.peft.inject import inject


def adapted(base, compute=torch.float32, method="lora", targets=(), how="blocks", device="cpu"):
    """A decoder whose adapter is not zero."""
    decoder = build_decoder(base, how, compute, device)
    inject(decoder, method, 4, 8.0, 0, targets)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    return decoder.to(device)


def backward(decoder, number, lengths, prefix):
    """The loss of a row of such segments behind a prefix, drawn by `number`; its gradients are added to those there."""
    n, device = prefix + sum(lengths), decoder.model.norm.weight.device
    ids = torch.randint(200, (n,), generator=torch.Generator().manual_seed(number)).to(device)
    positions = torch.cat([torch.arange(prefix), *(prefix + torch.arange(one) for one in lengths)]).to(device)
    hidden = decoder(ids, positions, list(itertools.accumulate(lengths, initial=prefix)), prefix)
    loss = decoder.nll(hidden[:-1], ids[1:]).sum()
    torch.autograd.backward(loss)
    return loss.detach()
