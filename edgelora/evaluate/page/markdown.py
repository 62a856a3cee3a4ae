"""`report.md`: the page's tables as Markdown, for a model card or a pull request; every text in it is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgelora.evaluate.cells import WAYS, CellResult, Report, UsedFile
from edgelora.evaluate.page import view
from edgelora.evaluate.page.bits import bits_map
from edgelora.evaluate.recommend import RULES, Choice

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!])")  # what Markdown or HTML could read something into


def markdown(report: Report, choice: Choice, picture: str | None = "report.png") -> str:
    """`picture`: the file beside it; None leaves it out."""
    parts = [
        f"# {escape(report.title)}",
        f"**{escape(choice.cell or 'No file can be recommended')}**",
        *(escape(line) for line in choice.why.splitlines()),
        *([f"![Quality over size]({picture})"] if picture else []),
        *_table(report, choice), *_speeds(report), *_sections(report), *_forgetting(report),
        *_bits(report, choice), *_answers(report),
        "## How it is decided", "\n".join(f"{i}. {escape(rule)}" for i, rule in enumerate(RULES, 1)),
        *_provenance(report),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """As one line of plain text, whatever stands in it."""
    return SPECIAL.sub(r"\\\1", " ".join(view.printable(text).split()))


def fenced(text: str) -> str:
    """As a block of code, its fence longer than any row of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{view.printable(text)}\n{fence}"


def _grid(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """`left`: how many columns of text come first; numbers follow."""
    ruler = ["---"] * left + ["---:"] * (len(titles) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ruler, *rows))


def _table(report: Report, choice: Choice) -> list[str]:
    titles, rows = view.table(report, choice)
    body = []
    for row in rows:
        name = f"**{escape(row.name)}** (recommended)" if row.is_chosen else escape(row.name)
        note = [escape(row.note)] if row.note else []
        values = [f"**{value.text}**" if value.is_best else value.text for value in row.values]
        body.append([" ".join([name, *(f"({n})" for n in note)]), *values])
    said = [f"{WAYS['torch']}: {escape(why)}. Never bold, never recommended." for why in view.in_torch(report)]
    return ["## All that was measured", _grid(["", *titles], body), "Bold: the best of its column.", *said]


def _speeds(report: Report) -> list[str]:
    lines = view.speeds(report)
    if not lines:
        return []
    titles = ["", "prompt tokens/s", "slowest … fastest", "generation tokens/s", "slowest … fastest", "loads in"]
    rows = [[escape(s.name), s.prompt, s.prompt_range, s.generation, s.generation_range, s.load] for s in lines]
    return ["## Speed", _grid(titles, rows)]


def _sections(report: Report) -> list[str]:
    parts = []
    for section in view.sections(report):
        note = f"; {section.note}" if section.note else ""
        lines = [
            [escape(line.name), line.verdict, line.value, line.interval, line.change or view.NONE]
            for line in section.lines
        ]
        titles = ["", "verdict", "value", "95 % interval", "against the best, paired"]
        parts += [f"## {escape(section.title)} ({section.better}{note})", _grid(titles, lines, left=2)]
    return parts


def _forgetting(report: Report) -> list[str]:
    parts = []
    for title, changes in view.forgetting(report):
        rows = [[escape(c.name), escape(c.base), c.verdict, c.before, c.after, c.change] for c in changes]
        titles = ["", "before is", "verdict", "before", "after", "change, 95 %"]
        parts += [f"### {escape(title)}", _grid(titles, rows, left=3)]
    return ["## What the adapter cost", *parts] if parts else []


def _bits(report: Report, choice: Choice) -> list[str]:
    chosen = next((cell for cell in report.cells if cell.name == choice.cell), None)
    found = bits_map(chosen.tensor_types) if chosen else None
    if found is None:
        return []
    rows = [[name, *(bits.text if bits else "" for bits in row)] for name, row in found.lines]
    others = ", ".join(f"{escape(name)} {bits.text}" for name, bits in found.others) or "none"
    grid = _grid(["layer", *map(escape, found.columns)], rows, left=len(found.columns) + 1)
    return [f"## Types of the tensors of {escape(choice.cell)}", grid, f"Outside the layers: {others}."]


def _answers(report: Report) -> list[str]:
    parts = []
    for sample in view.answers(report):
        parts += [f"### {escape(sample.prompt)}", f"Expected:\n\n{fenced(sample.reference)}"]
        for alike in sample.given:
            who = ", ".join(escape(name) for name, _ in alike.who)
            parts.append(f"As expected: {who}." if alike.is_expected else f"{who}:\n\n{fenced(alike.text)}")
    return ["## Sample answers", *parts] if parts else []


def _provenance(report: Report) -> list[str]:
    made = report.provenance
    facts = {
        "created": made.created, "CPU": made.cpu, "threads": made.threads, "seeds": ", ".join(map(str, made.seeds)),
        **made.versions, **made.settings,
    }  # fmt: skip
    shared: list[tuple[str, UsedFile]] = [("", file) for file in (*made.data, *made.files)]
    return [
        "## Where this comes from",
        fenced(made.command),
        _grid(["", ""], [[escape(name), escape(str(value))] for name, value in facts.items()], left=2),
        _grid(
            ["file", "what", "sha256", "bytes"],
            [_file(cell, file) for cell, file in shared + _own_files(report.cells)],
            left=3,
        ),
    ]


def _own_files(cells: Sequence[CellResult]) -> list[tuple[str, UsedFile]]:
    return [(cell.name, file) for cell in cells for file in cell.files]


def _file(cell: str, file: UsedFile) -> list[str]:
    what = f"{cell}: {file.role}" if cell else file.role
    return [escape(file.path), escape(what), escape(file.sha256), f"{file.size_bytes:,}"]
