"""The side of edgelora in benchmarks/gpu.py, on a CPU: where there is no card, nothing else would find it broken."""

from __future__ import annotations

import importlib

import pytest
from conftest import ROOT

SETTINGS = {
    "shape": "tiny", "device": "cpu", "tokens": 128, "hold": None, "recompute": True, "offload": False,
    "optimizer": "adamw", "graphs": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("held", "more"), [("nf4", {}), ("q4_k", {}), ("nf4", {"ragged": True})], ids=["nf4", "q4_k", "ragged"]
)
def test_our_side_takes_steps(tmp_path, monkeypatch, held, more):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    channel = importlib.import_module("peers.channel")
    with channel.Side("gpu_ours", {**SETTINGS, "held": held, **more}, tmp_path / "log", threads=1) as side:
        assert len(side.facts["losses"]) == 2
        taken = side.steps(1)
        assert side.do("peaks") == {}
    assert taken["tokens"] == 128 if not more else taken["tokens"] > 32 * 50
    assert taken["seconds"] > 0
