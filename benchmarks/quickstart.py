"""Run the quickstart and hold it to its targets: time, memory of training, exact match. Records the report.

    .venv/bin/python benchmarks/quickstart.py

Writes benchmarks/results/quickstart.json and quickstart.md, which README.md shows (benchmarks/readme.py).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelora.pipeline.quickstart import Quickstart

RESULTS = Path(__file__).resolve().parent / "results"


def targets(result: Quickstart) -> list[tuple[str, str, str, bool]]:
    """(what, target, found, met) for each target of the quickstart."""
    base, live, q8, _ = (row.scored for row in result.rows)
    known, new = live.groups["known"].exact_match, live.groups["new"].exact_match
    gap = abs(q8.all.exact_match - live.all.exact_match)
    return [
        ("minutes, once installed", "≤ 10", f"{result.seconds / 60:.1f}", result.seconds <= 600),
        ("peak memory of training, MB", "≤ 1200", f"{result.run.peak_bytes / 1e6:.0f}", result.run.peak_bytes <= 1.2e9),
        ("exact match, base", "< 5 %", f"{base.all.exact_match:.0%}", base.all.exact_match < 0.05),
        ("exact match, live, known wordings", "≥ 90 %", f"{known:.0%}", known >= 0.9),
        ("exact match, live, new wordings", "≥ 75 %", f"{new:.0%}", new >= 0.75),
        ("exact match, Q8_0 against live", "within 2 points", f"{gap * 100:.0f} points", gap <= 0.02 + 1e-9),
    ]


def main() -> int:
    # the children that measure import this file: they must not import torch with it
    from edgelora.cli.display import Display
    from edgelora.pipeline.quickstart import quickstart

    with Display() as display:
        result = quickstart(display.say, display.show)
    rows = targets(result)
    print("| what | target | found | |\n|---|---:|---:|---|")
    for what, target, found, met in rows:
        print(f"| {what} | {target} | {found} | {'met' if met else 'NOT MET'} |")
    RESULTS.mkdir(exist_ok=True)
    for suffix in (".md", ".json"):
        shutil.copy(result.folder / f"report{suffix}", RESULTS / f"quickstart{suffix}")
    found = [dict(zip(("what", "target", "found", "met"), row, strict=True)) for row in rows]
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (RESULTS / "quickstart-targets.json").write_text(text, encoding="utf-8")
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
