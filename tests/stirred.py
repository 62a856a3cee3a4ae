"""Adapters that have learned something, without a step of training: fresh ones whose every number was moved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from edgelora.base.decoder import build_decoder
from edgelora.base.model import Base
from edgelora.nn.decoder import Decoder
from edgelora.peft.adapter import Adapter, write_adapter
from edgelora.peft.inject import adapter_config, collect, inject
from edgelora.peft.targets import Where


@dataclass(frozen=True)
class Stir:
    """Of a rank and an α, moved by numbers that are uniform in ±`by`/2, always the same ones."""

    rank: int
    alpha: float
    by: float

    def on(
        self, base: Base, method: str, targets: Iterable[str] | Where = (), folder: Path | None = None
    ) -> tuple[Decoder, Adapter]:
        """A decoder with a stirred adapter of the method on it, and the adapter, which is written to `folder`."""
        decoder, where = build_decoder(base), targets if isinstance(targets, Where) else Where(tuple(targets))
        inject(decoder, method, self.rank, self.alpha, seed=0, targets=where)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter += self.by * (torch.rand(parameter.shape, generator=generator) - 0.5)
        config = adapter_config(decoder, method, self.rank, self.alpha, str(base.path), where)
        adapter = Adapter(config, collect(decoder))
        if folder is not None:
            write_adapter(folder, adapter)
        return decoder, adapter
