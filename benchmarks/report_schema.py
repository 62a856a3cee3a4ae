"""Write docs/report.md: the schema of report.json, from the dataclasses that read and write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from edgelora.evaluate.cells import WAYS, Report
from edgelora.evaluate.measures import MEASURES
from edgelora.evaluate.recommend import RULES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "report.md"
HEAD = """# report.json

What `edgelora report` measured, and all that report.html, report.md and report.png are drawn from. One JSON object, a
`Report`; each table below is one kind of object in it. A number that is none (NaN, infinity) is `null`. Bytes are
bytes, seconds are seconds, shares are 0 to 1, nats are natural logarithms. Fields that are not named here are refused;
`format` changes when a field does.

`edgelora compare` reads two of them, and refuses reports of different data. `python benchmarks/report_schema.py` writes
this file.
"""


def written() -> str:
    schema = TypeAdapter(Report).json_schema()
    kinds: dict[str, Any] = {"Report": schema, **schema["$defs"]}
    order = ["Report", "CellResult", "Measure", "Speed", "Sample", "Provenance", "UsedFile"]
    assert sorted(order) == sorted(kinds), "a kind of object is not in the page's order"
    return "\n".join([HEAD, *(line for name in order for line in _object(name, kinds[name])), *_measures(), *_rest()])


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}\n\n{_one_line(schema.get('description', ''))}\n"
    yield "| field | type | what |\n|---|---|---|"
    for field, about in schema["properties"].items():
        optional = "" if field in schema.get("required", ()) else ", optional"
        yield f"| `{field}` | {_type(about)}{optional} | {_one_line(about.get('description', ''))} |"
    yield ""


def _type(about: Mapping[str, Any]) -> str:
    if "$ref" in about:
        name = about["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in about or isinstance(about.get("type"), list):
        parts = about.get("anyOf") or [{"type": name} for name in about["type"]]
        return " or ".join(_type(part) for part in parts)
    if "enum" in about or "const" in about:
        return " or ".join(f"`{value}`" for value in about.get("enum", [about.get("const")]))
    if about.get("type") == "array":
        if "prefixItems" in about:
            return "[" + ", ".join(_type(part) for part in about["prefixItems"]) + "]"
        return f"list of {_type(about['items'])}"
    if about.get("type") == "object":
        return f"object of {_type(about['additionalProperties'])}"
    return str(about["type"])


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _measures() -> Iterator[str]:
    yield "## Measures\n\nThe keys of `measures`; behind a `/` stands a part: `right/known`, `choice/arc-easy`.\n"
    yield "| key | what | about | better | rows; weights |\n|---|---|---|---|---|"
    for key, kind in MEASURES.items():
        better = "higher" if kind.better > 0 else "lower"
        yield f"| `{key}` | {kind.title} | {kind.about} | {better} | {kind.rows} |"
    yield ""


def _rest() -> Iterator[str]:
    yield "## Ways\n\n| way | what |\n|---|---|"
    yield from (f"| `{way}` | {title} |" for way, title in WAYS.items())
    yield "\n## How a file is recommended\n"
    yield from (f"{i}. {rule}" for i, rule in enumerate(RULES, 1))
    yield ""


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
