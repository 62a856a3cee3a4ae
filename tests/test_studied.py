"""What the study of ways advises: never a way that was measured, and nothing where nothing is lost."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from converters.quant_types import QUANT_TYPES
from edgelora.evaluate.studied import COARSE, EXACT, STUDY, advice

SUMMARY = ROOT / "benchmarks" / "results" / "which-way.json"


@pytest.mark.parametrize("quant", sorted(QUANT_TYPES))
def test_a_way_is_advised_where_bits_are_lost_and_it_was_not_measured(quant):
    found = advice(quant, ["live", "merged"])
    assert advice(quant, ["live", "trained"]) is None
    assert (found is None) == (quant in EXACT)
    assert found is None or (
        quant in found and STUDY in found and found.startswith("Below") == quant.startswith(COARSE)
    )


@pytest.mark.skipif(not SUMMARY.exists(), reason="the study has not been summed up yet")
def test_the_study_says_so():
    """Training over the very file is better than over F16 below 4 bits, and gains less the more bits there are."""
    levels = json.loads(SUMMARY.read_text(encoding="utf-8"))["levels"]
    questions = {quant: {(q["b"], q["a"]): q["loss"] for q in level["questions"]} for quant, level in levels.items()}
    gains = {quant: asked[4, 2] for quant, asked in questions.items()}
    for quant, gain in gains.items():
        if quant.startswith(COARSE):
            assert gain["is_clear"]
            assert gain["value"] < 0
    values = [gain["value"] for gain in gains.values()]
    assert values[0] == min(values)
