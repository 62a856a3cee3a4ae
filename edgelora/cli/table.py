"""Draw a report's table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from edgelora.evaluate.report import Row, cells


def draw(rows: Sequence[Row]) -> None:
    titles, body = cells(rows)
    table = Table(*titles, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for line in body:
        table.add_row(*line)
    Console().print(table)
