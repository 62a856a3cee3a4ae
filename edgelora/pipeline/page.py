"""Write a report as files: report.json, report.html, report.md and report.png, each of them whole or not at all."""

from __future__ import annotations

from pathlib import Path

from edgelora.errors import FileFormatError
from edgelora.evaluate.cells import Report, report_from_json
from edgelora.evaluate.page.html import drawings, html
from edgelora.evaluate.page.markdown import markdown
from edgelora.evaluate.page.picture import png
from edgelora.evaluate.recommend import Choice, Limits, recommend
from edgelora.files.atomic import staged

JSON, HTML, MARKDOWN, PICTURE = "report.json", "report.html", "report.md", "report.png"


def write_page(report: Report, folder: Path, limits: Limits | None = None) -> Choice:
    """Into `folder`, in the place of an older one; what it recommends. No picture without two cells to draw.

    Raises OutputError, and ConfigError for limits that cannot be applied.
    """
    choice = recommend(report.cells, limits)
    plots = drawings(report, choice)
    picture = PICTURE if plots else None
    texts = {JSON: report.to_json(), HTML: html(report, choice), MARKDOWN: markdown(report, choice, picture)}
    files = {name: text.encode() for name, text in texts.items()} | ({PICTURE: png(plots)} if plots else {})
    for name, content in files.items():
        with staged(folder / name, overwrite=True) as draft:
            draft.write_bytes(content)
    if not plots:
        (folder / PICTURE).unlink(missing_ok=True)
    return choice


def read_report(path: Path) -> Report:
    """A report.json, or that of a folder. Raises FileFormatError."""
    file = path / JSON if path.is_dir() else path
    try:
        return report_from_json(file.read_bytes(), str(file))
    except OSError as e:
        raise FileFormatError(
            what=f"{file} cannot be read ({e.strerror})",
            why="a report is a folder with a report.json, or that file",
            fix="check the path, or make one with `edgelora report`",
        ) from e
