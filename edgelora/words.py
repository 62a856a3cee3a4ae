"""How counts and what strangers wrote are put into words."""

from __future__ import annotations


def count(n: int, noun: str) -> str:
    """`1 token`, `1,234 tokens`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def size(n_bytes: int) -> str:
    """`46.1 kB`, `144.8 MB`, `4.7 GB`."""
    scale, unit = (1e3, "kB") if n_bytes < 999_950 else (1e6, "MB") if n_bytes < 999_950_000 else (1e9, "GB")
    return f"{n_bytes / scale:.1f} {unit}"


def visible(text: str | bytes, blank: str = " ") -> str:
    """A text on one line, with escapes for what a terminal would not show or would obey, and `blank` for a blank."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    return "".join(map(_visible, text)).replace(" ", blank)


def _visible(c: str) -> str:
    if c.isprintable() and c != "\\":
        return c
    if "\udc80" <= c <= "\udcff":  # a byte of a character that is not whole
        return f"\\x{ord(c) - 0xDC00:02x}"
    return f"\\u{ord(c):04x}" if "\x7f" < c <= "\xff" else c.encode("unicode_escape").decode()
