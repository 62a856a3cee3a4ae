"""Draw a report's table on the terminal; it stays whole at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from edgelora.evaluate.report import Measured, cells

NAME_WIDTH = 8  # "adapter,", "merged", "Q4_K_M"


def draw(rows: Sequence[Measured], only: Sequence[str] = (), metric: str | None = None) -> None:
    """Print the report's table on stdout, with the short titles; `only` some columns, by their keys."""
    titles, body = cells(rows, short=True, only=only, metric=metric)
    table = Table(
        *(t.replace(" ", "\n") for t in titles), header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=0,
        show_edge=False,
    )  # fmt: skip
    table.columns[0].min_width = NAME_WIDTH  # it can be wrapped, and would be the first to vanish
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line in body:
        table.add_row(*line)
    Console().print(table)
