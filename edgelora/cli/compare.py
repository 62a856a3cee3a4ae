"""`edgelora compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import Json

if TYPE_CHECKING:
    from edgelora.evaluate.two_reports import Comparison

Report = Annotated[Path, typer.Argument(help="A report.json, or the folder of a report.", show_default=False)]


def compare(before: Report, after: Report, as_json: Json = False) -> None:
    """Two reports of the same data beside each other: each file's figures before and after, and what is only noise.

    Example: `edgelora compare monday/report.json today/report.json`
    """
    from edgelora.evaluate.two_reports import compare_reports
    from edgelora.pipeline.page import read_report

    found = compare_reports(read_report(before), read_report(after), (str(before), str(after)))
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _draw(found)


def _draw(found: Comparison) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from edgelora.cli.display import output

    table = Table("", "before", "after", "", "change, 95 %", box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for column in table.columns[1:3]:
        column.justify = "right"
    last = ""
    for pair in found.pairs:
        if pair.cell != last:
            table.add_row(f"[bold]{escape(last := pair.cell)}[/bold]")
        change = "" if pair.verdict == "equal" else pair.change
        table.add_row(*map(escape, (f"  {pair.measure}", pair.before, pair.after, pair.verdict, change)))
    console = output()
    if found.pairs:
        console.print(table)
    for title, names in (
        ("only before", found.only_before), ("only after", found.only_after), ("measured otherwise", found.settings),
        ("built from other files", found.files),
    ):  # fmt: skip
        if names:
            console.print(f"{title}: {'; '.join(names)}", markup=False, highlight=False)
