"""A drawing as SVG that stands in an HTML page, whose style sheet gives the colours."""

from __future__ import annotations

from markupsafe import Markup

from edgelora.evaluate.page.plot import Bubble, Drawing, Line, Text


def paint(drawing: Drawing, css_class: str) -> Markup:
    """Every text in it is escaped."""
    body = Markup("\n").join(_shape(shape) for shape in drawing.shapes)
    return Markup('<svg class="{}" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">\n{}\n</svg>').format(
        css_class, drawing.width, drawing.height, drawing.title, body
    )


def _shape(shape: Line | Bubble | Text) -> Markup:
    if isinstance(shape, Line):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        return Markup('<polyline class="{}" points="{}"/>').format(
            _classes(shape.role, way=shape.way, faded=shape.is_faded), points
        )
    if isinstance(shape, Bubble):
        named = _classes("bubble", way=shape.way, faded=shape.is_faded, chosen=shape.is_chosen)
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>').format(
            named, shape.x, shape.y, shape.radius, shape.title
        )
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        _classes(shape.role, faded=shape.is_faded), shape.x, shape.y, shape.anchor, shape.text
    )


def _classes(role: str, *, way: str = "", faded: bool = False, chosen: bool = False) -> str:
    return " ".join([role, *([f"way-{way}"] if way else []), *(["faded"] * faded), *(["chosen"] * chosen)])
