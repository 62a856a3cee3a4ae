"""`report.html`: one file that asks nothing of a network and runs no script; every text in it is escaped."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from edgelora.evaluate.cells import WAYS, Report, in_order
from edgelora.evaluate.page import view
from edgelora.evaluate.page.bits import bits_map
from edgelora.evaluate.page.picture import COLORS
from edgelora.evaluate.page.plot import Drawing, pareto_plot
from edgelora.evaluate.page.svg import paint
from edgelora.evaluate.pareto import ranked_by
from edgelora.evaluate.recommend import RULES, Choice

DESKTOP, PHONE = (760.0, 430.0), (380.0, 400.0)


def drawings(report: Report, choice: Choice, size: tuple[float, float] = DESKTOP) -> list[Drawing]:
    """One for each measure that the cells are ranked by."""
    keys = ranked_by([cell for cell in report.cells if cell.status == "ok"])
    plots = [pareto_plot(in_order(report.cells), key, choice.cell, *size) for key in keys]
    return [plot for plot in plots if plot is not None]


def html(report: Report, choice: Choice) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = view.printable
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    titles, rows = view.table(report, choice)
    chosen = next((cell for cell in report.cells if cell.name == choice.cell), None)
    wide, narrow = drawings(report, choice), drawings(report, choice, PHONE)
    return template.render(
        report=report, choice=choice, chosen=chosen, rules=RULES, colors=COLORS, ways=WAYS, titles=titles, rows=rows,
        plots=[(a, paint(a, "wide"), paint(b, "narrow")) for a, b in zip(wide, narrow, strict=True)],
        sections=view.sections(report), speeds=view.speeds(report), changes=view.forgetting(report),
        answers=view.answers(report), bits=bits_map(chosen.tensor_types) if chosen else None,
        in_torch=view.in_torch(report),
    )  # fmt: skip
