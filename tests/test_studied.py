"""What the study of ways advises: never a way that was measured, and nothing where nothing is lost."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from converters.quant_types import QUANT_TYPES
from edgelora.evaluate.studied import COARSE, STUDY, TWO_BITS, advice

SUMMARY = ROOT / "benchmarks" / "results" / "which-way.json"


@pytest.mark.parametrize("quant", sorted(QUANT_TYPES))
def test_a_way_is_advised_where_bits_are_lost_and_it_was_not_measured(quant):
    found = advice(quant, ["live", "merged"])
    assert advice(quant, ["live", "trained"]) is None
    assert (found is not None) == quant.startswith(COARSE)
    assert found is None or (quant in found and STUDY in found)
    assert found is None or ("--ways imatrix" in found) == quant.startswith(TWO_BITS)
    assert "--ways imatrix" not in (advice(quant, ["merged", "imatrix"]) or advice(quant, ["live"]) or "")


@pytest.mark.skipif(not SUMMARY.exists(), reason="the study has not been summed up yet")
def test_the_study_says_so():
    """Training over the very file is better than over F16 below 4 bits, and nothing clearly is from there on."""
    levels = json.loads(SUMMARY.read_text(encoding="utf-8"))["levels"]
    assert len(levels) == 5
    for quant, level in levels.items():
        asked = {(q["b"], q["a"]): q["loss"] for q in level["questions"]}
        over_it = {asked[4, 1]["is_clear"], asked[4, 2]["is_clear"]}
        assert over_it == {quant.startswith(COARSE)}
        assert not quant.startswith(COARSE) or max(asked[4, 1]["value"], asked[4, 2]["value"]) < 0
        matrix = asked[6, 1]
        assert (matrix["is_clear"] and matrix["value"] < 0) == quant.startswith(TWO_BITS)
