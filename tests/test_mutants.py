"""Thousands of broken files: each one opens or is a typed error, within 2 s of CPU and 256 MB + 2 × its size.

Whole files are taken apart into their fields (counts, lengths, types, dimensions, offsets, names, values), some of them
are changed, and the reader is run on the result in a child process that has just these limits. A mutant is its seed:
`python tests/test_mutants.py gguf FILE SCRATCH SEED 1` repeats one.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType
from safetensors.numpy import load_file, save_file

from edgelora.data.vocabulary import vocabulary_from_folder
from edgelora.errors import EdgeloraError, FileFormatError
from edgelora.files.checkpoint import MAX_JSON_BYTES, read_json
from edgelora.files.gguf import MAX_ENTRIES, MAX_STRINGS, MAX_TEXT_BYTES, GGUFFile
from edgelora.files.safetensors import (
    DTYPE_BITS,
    JSON_COSTS,
    MAX_HEADER_BYTES,
    MAX_JSON_COST_BYTES,
    MAX_TENSORS,
    SafetensorsFile,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of the child process are Linux's")

LARGE_JSON_BYTES = 40 << 20  # Gemma's tokenizer.json has 33 MB
CPU_S = 2.0
MEMORY_BYTES = 256 << 20
V = GGUFValueType

NUMBERS = [0, 1, 2, 7, 63, 64, 255, 256, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63]
NUMBERS += [-1, -8, -32, -(1 << 31), -(1 << 63)]
Mutant = tuple[bytes, int, str]  # its header, its size (what lies behind the header is zeros), its story
TEXTS = [b"", b"\0", b"a\0b", b"\xff\xfe", b"\x1b[2J", "é😀".encode(), b"n" * 64, b"n" * 70_000, b"../../x", b" " * 9]


# -- GGUF ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """Some bytes of a header. `role` says what they are, ending in `number` for an integer and `text` for a text."""

    role: str
    raw: bytes


Entry = list[Field]


@dataclass
class GGUF:
    """A file in parts: magic and version, an entry for each key and each tensor, and how much data follows."""

    head: Entry
    keys: list[Entry]
    tensors: list[Entry]
    data_bytes: int

    def entries(self) -> list[Entry]:
        return [self.head, *self.keys, *self.tensors]

    def render(self) -> bytes:
        header = b"".join(field.raw for field in chain(*self.entries()))
        return header + bytes(-len(header) % 32)


def number(role: str, n: int, n_bytes: int = 4) -> Field:
    return Field(f"{role} number", (n & ((1 << 8 * n_bytes) - 1)).to_bytes(n_bytes, "little"))


def text(role: str, raw: bytes) -> Entry:
    return [number(f"{role} length", len(raw), 8), Field(f"{role} text", raw)]


def value(kind: int, payload: Entry) -> Entry:
    return [number("value type", kind), *payload]


def array(item: int, n: int, payload: Entry) -> Entry:
    return value(V.ARRAY, [number("item type", item), number("item count", n, 8), *payload])


SIZES = {V.UINT8: 1, V.INT8: 1, V.BOOL: 1, V.UINT16: 2, V.INT16: 2, V.UINT32: 4, V.INT32: 4, V.FLOAT32: 4}
SIZES |= {V.UINT64: 8, V.INT64: 8, V.FLOAT64: 8}


@cache
def take_apart(raw: bytes) -> GGUF:
    """The fields of a whole file, by the description of the format and not by our reader."""
    at = 0

    def integer(entry: Entry, role: str, n_bytes: int = 4) -> int:
        nonlocal at
        at += n_bytes
        entry.append(Field(f"{role} number", raw[at - n_bytes : at]))
        return int.from_bytes(entry[-1].raw, "little")

    def some(entry: Entry, role: str, n_bytes: int) -> None:
        nonlocal at
        at += n_bytes
        entry.append(Field(role, raw[at - n_bytes : at]))

    def texts(entry: Entry, role: str, n: int = 1) -> None:
        for _ in range(n):
            some(entry, f"{role} text", integer(entry, f"{role} length", 8))

    head: Entry = []
    some(head, "magic text", 4)
    integer(head, "version")
    n_tensors, n_keys = integer(head, "tensor count", 8), integer(head, "key count", 8)
    keys: list[Entry] = [[] for _ in range(n_keys)]
    for entry in keys:
        texts(entry, "key")
        kind = integer(entry, "value type")
        if kind == V.ARRAY:
            item, n = integer(entry, "item type"), integer(entry, "item count", 8)
            texts(entry, "item", n) if item == V.STRING else some(entry, "items", n * SIZES[V(item)])
        elif kind == V.STRING:
            texts(entry, "value")
        else:
            integer(entry, "value", SIZES[V(kind)])
    tensors: list[Entry] = [[] for _ in range(n_tensors)]
    for entry in tensors:
        texts(entry, "name")
        for _ in range(integer(entry, "rank")):
            integer(entry, "dimension", 8)
        integer(entry, "type")
        integer(entry, "offset", 8)
    return GGUF(head, keys, tensors, len(raw) - at - -at % 32)


def some_value(draw: random.Random) -> Entry:
    """A whole metadata value of any type."""
    kind, n = draw.choice([*V, V.STRING, V.ARRAY]), draw.choice([0, 1, 3, 512, 5000])
    if kind == V.STRING:
        return value(kind, text("value", draw.choice(TEXTS)))
    if kind != V.ARRAY:
        return value(kind, [number("value", draw.choice(NUMBERS), SIZES[kind])])
    item = draw.choice(list(V))
    if item == V.STRING:
        return array(item, n, text("item", draw.choice(TEXTS[:7])) * n)
    if item == V.ARRAY:
        return array(item, 1, array(V.UINT8, 1, [number("value", 1, 1)]))
    return array(item, n, [Field("items", draw.randbytes(n * SIZES[item]))])


def pick(draw: random.Random, file: GGUF) -> tuple[Entry, int]:
    """A field; each entry is as likely as another, and in it each role: a vocabulary is thousands of texts."""
    entry = draw.choice([entry for entry in file.entries() if entry])
    role = draw.choice(sorted({field.role for field in entry}))
    return entry, draw.choice([i for i, field in enumerate(entry) if field.role == role])


def mutate_gguf(draw: random.Random, file: GGUF) -> str:
    """Change one thing in place and say what."""
    (entry, i), (other, j) = pick(draw, file), pick(draw, file)
    role, old = entry[i].role, entry[i].raw
    where = f"{role} {old[:16]!r}"
    match draw.choice(["value", "value", "value", "drop", "repeat", "swap", "cut", "entry", "retype", "align", "data"]):
        case "value" if role.endswith("number"):
            n = int.from_bytes(old, "little")
            near = [n + 1, n - 1, n * 2, n << 32, n ^ (1 << draw.randrange(8 * len(old) or 1)), draw.randrange(64)]
            entry[i] = number(role.removesuffix(" number"), draw.choice([draw.choice(NUMBERS), *near]), len(old))
            return f"{where} becomes {int.from_bytes(entry[i].raw, 'little')}"
        case "value" if role.endswith("text"):
            new = draw.choice([*TEXTS, other[j].raw])
            honest = draw.random() < 0.7 and i > 0
            entry[i - honest : i + 1] = text(role.removesuffix(" text"), new)[1 - honest :]
            return f"{where} becomes {new[:16]!r}" + " and its length is true" * honest
        case "drop":
            del entry[i]
            return f"{where} is left out"
        case "repeat":
            entry.insert(i, entry[i])
            return f"{where} stands twice"
        case "swap":
            entry[i], other[j] = other[j], entry[i]
            return f"{where} changes places with {entry[i].role}"
        case "cut":
            entry[i] = Field(role, old[: draw.randrange(len(old) + 1)])
            return f"{where} keeps {len(entry[i].raw)} bytes"
        case "entry":
            return mutate_entries(draw, file)
        case "retype" if file.keys:
            entry = draw.choice(file.keys)
            at = next((j for j, field in enumerate(entry) if field.role == "value type number"), len(entry))
            entry[at:] = some_value(draw)
            return f"{entry[1:2]} becomes {[field.raw[:16] for field in entry[at : at + 4]]}"
        case "align":
            kind = draw.choice([V.UINT32, V.UINT64, V.INT32])
            raw = number("value", draw.choice([*NUMBERS, 4, 8, 16, 32, 128, 4096]), SIZES[kind])
            file.keys.append(text("key", b"general.alignment") + value(kind, [raw]))
            file.head[-1] = number("key count", len(file.keys), 8)
            return f"general.alignment is {raw}"
        case _:
            n = file.data_bytes
            file.data_bytes = draw.choice([draw.randrange(n + 1), max(n - 1, 0), n + 31, n + (4 << 20)])
            return f"the data is {file.data_bytes} bytes"


def mutate_entries(draw: random.Random, file: GGUF) -> str:
    """Drop, repeat or swap whole keys or tensors; the counts stay true."""
    name = draw.choice(["keys", "tensors"])
    entries: list[Entry] = getattr(file, name)
    if not entries:
        return "nothing"
    i, j = draw.randrange(len(entries)), draw.randrange(len(entries))
    what = draw.choice(["drop", "repeat", "swap"])
    if what == "drop":
        del entries[i]
    elif what == "repeat":
        entries.insert(j, list(entries[i]))
    else:
        entries[i], entries[j] = entries[j], entries[i]
    file.head[2:] = [number("tensor count", len(file.tensors), 8), number("key count", len(file.keys), 8)]
    return f"{what} {name} {i} {j}"


def gguf_mutant(raw: bytes, draw: random.Random) -> Mutant:
    whole = take_apart(raw)
    file = GGUF(list(whole.head), list(map(list, whole.keys)), list(map(list, whole.tensors)), whole.data_bytes)
    story = "; ".join(mutate_gguf(draw, file) for _ in range(draw.choice([1, 1, 2, 3])))
    header = file.render()
    size = len(header) + file.data_bytes
    if draw.random() < 0.1:
        size = draw.randrange(size)
        story += f"; cut to {size} bytes"
    return header, size, story


def gguf_of(n_keys: int = 0, keys: bytes = b"", n_tensors: int = 0, tensors: bytes = b"", data: bytes = b"") -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + keys + tensors
    return header + bytes(-len(header) % 32) + data


def numbered(n: int, behind: bytes, n_letters: int = 5) -> bytes:
    """n entries, each a name of its own and what stands behind it."""
    return b"".join(struct.pack("<Q", n_letters) + b"%0*x" % (n_letters, i) + behind for i in range(n))


def gguf_bombs() -> Iterator[tuple[bytes, str]]:
    """As much work as the reader's limits let a file ask for, each limit by itself; and more than that."""
    arrays = struct.pack("<IIQ", V.ARRAY, V.STRING, 0), struct.pack("<IIQd", V.ARRAY, V.FLOAT64, 1, 0.5)
    for n in (MAX_ENTRIES, 4 * MAX_ENTRIES):
        yield from ((gguf_of(n, numbered(n, a)), f"{n} arrays of {len(a) - 16} bytes") for a in arrays)
        tensors = b"".join(struct.pack("<Q5sI4QIQ", 5, b"%05x" % i, 4, 1, 1, 1, 1, 0, 32 * i) for i in range(n))
        yield gguf_of(0, b"", n, tensors, bytes(32 * n)), f"{n} tensors"
    for n in (MAX_STRINGS, 1 << 24):
        head = struct.pack("<Q1sIIQ", 1, b"k", V.ARRAY, V.STRING, n)
        yield gguf_of(1, head + bytes(8 * n)), f"{n} strings"
    for n in (MAX_TEXT_BYTES - 1, 4 * MAX_TEXT_BYTES):
        yield (
            gguf_of(1, struct.pack("<Q1sIQ", 1, b"k", V.STRING, n) + bytes(n - 4) + "😀".encode()),
            f"a text of {n} bytes",
        )
    names = numbered(2000, struct.pack("<IB", V.BOOL, 1), 60_000).replace(b"0000000000000000", "éééééééé".encode())
    yield gguf_of(2000, names), "120 MB of names"
    yield gguf_of(1 << 40, bytes(89)), "113 bytes that claim 2^40 keys"
    yield gguf_of(1, struct.pack("<Q1sIIQ", 1, b"k", V.ARRAY, V.UINT8, 1 << 40) + bytes(60)), "an array of 2^40 bytes"


# -- safetensors --------------------------------------------------------------------------------------------------


class Table(list[Any]):
    """A JSON object as a list of [name, value], so that a name can stand in it twice."""


def as_table(pairs: list[tuple[str, Any]]) -> Table:
    return Table(map(list, pairs))


class Raw(str):
    """JSON as it shall stand in the file."""


def dump(found: Any) -> str:
    if isinstance(found, Table):
        return (
            "{" + ",".join(":".join(map(dump, pair)) if isinstance(pair, list) else dump(pair) for pair in found) + "}"
        )
    if isinstance(found, Raw):
        return str(found)
    return "[" + ",".join(map(dump, found)) + "]" if isinstance(found, list) else json.dumps(found)


def inner(found: Any) -> Iterator[tuple[list[Any], int]]:
    """(list, index) of everything inside, at any depth: names and values of tables, items of lists."""
    if isinstance(found, list):
        for i, part in enumerate(found):
            yield found, i
            yield from inner(part)


WORDS = [
    "",
    "\0",
    "t",
    "__metadata__",
    "dtype",
    "shape",
    "data_offsets",
    "\x1b[2J",
    "é😀",
    "n" * 2000,
    *DTYPE_BITS,
    "F128",
]
ODD = [None, True, 2.0, 1.5, -0.0, [], Table(), [[]], Table([["a", 1]]), [0] * 9, [0, 1 << 62, 1 << 62], [1] * 65]
ODD += [
    Raw(r) for r in ("NaN", "1e999", "1" * 5000, "[" * 500, "'a'", '"\\ud800"', "", "}", "0x10", '"\n"', "[" * 100_000)
]


def safetensors_mutant(raw: bytes, draw: random.Random) -> Mutant:
    length = int.from_bytes(raw[:8], "little")
    header, data_bytes = json.loads(raw[8 : 8 + length], object_pairs_hook=as_table), len(raw) - 8 - length
    story = "; ".join(mutate_header(draw, header) for _ in range(draw.choice([1, 1, 2, 3])))
    out, claimed = dump(header).encode(), None
    match draw.choice(["", "", "", "", "text", "length", "data", "pad", "encode"]):
        case "text":
            at, new = (
                draw.randrange(len(out)),
                draw.choice([b"", b"{", b"}", b'"', b",", b":", b"\\", b"\0", b"\xff", b"9"]),
            )
            out = out[:at] + new + out[at + draw.randrange(2) :]
            story += f"; the header has {new!r} at {at}"
        case "length":
            claimed = draw.choice([*NUMBERS, len(out) - 1, len(out) + 1, len(out) + data_bytes]) & ((1 << 64) - 1)
            story += f"; the header claims {claimed} bytes"
        case "data":
            data_bytes = draw.choice([draw.randrange(data_bytes + 1), data_bytes + draw.choice([1, 8, 4 << 20]), 0])
            story += f"; the data is {data_bytes} bytes"
        case "pad":
            out += draw.choice([b" ", b"\0", b"\n", b"{}"]) * draw.choice([1, 8, 100_000])
            story += "; the header is padded"
        case "encode":
            out = dump(header).encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"]))
            story += "; the header is in another encoding"
    return struct.pack("<Q", len(out) if claimed is None else claimed) + out, 8 + len(out) + data_bytes, story


def mutate_header(draw: random.Random, header: Table) -> str:
    """Change one thing of a safetensors header in place and say what."""
    if header and draw.random() < 0.4:
        return mutate_tensor(draw, header)
    return mutate_json(draw, list(inner(header)))


def mutate_json(draw: random.Random, places: list[tuple[list[Any], int]]) -> str:
    """Change what stands at one of these places and say what."""
    if not places:
        return "nothing"
    where, i = draw.choice(places)
    old = where[i]
    what = draw.choice(["odd", "number", "number", "word", "drop", "repeat", "swap", "move"])
    if what == "number" and type(old) is int:
        where[i] = draw.choice([*NUMBERS, old + 1, old - 1, old * 2, -old, old + 4])
    elif what in ("number", "word"):
        where[i] = draw.choice(WORDS)
    elif what == "odd":
        where[i] = copy.deepcopy(draw.choice(ODD))
    elif what == "drop":
        del where[i]
    elif what == "repeat":
        where.insert(draw.randrange(len(where) + 1), copy.deepcopy(old))
    elif what == "swap":
        j = draw.randrange(len(where))
        where[i], where[j] = where[j], where[i]
    else:
        delta = draw.choice([-4, -1, 1, 4, 1 << 32])
        for there, j in places:  # every offset, and every shape of two dimensions
            if type(there[j]) is int and len(there) == 2:
                there[j] += delta
    return f"{what} {dump(old)[:80]}"


def mutate_tensor(draw: random.Random, header: Table) -> str:
    """Change a tensor of the header, or its place there, into what can stand in a whole file."""
    pairs = [p for p in header if isinstance(p, list) and len(p) == 2 and isinstance(p[1], Table)]
    if not pairs:
        return "nothing"
    pair, place = draw.choice(pairs), draw.randrange(len(header))
    fields = {p[0]: p for p in pair[1] if isinstance(p, list) and len(p) == 2 and isinstance(p[0], str)}
    what = draw.choice(["order", "name", "dtype", "flat", "rank", "turn", "metadata"])
    if what == "order":
        header.remove(pair)
        header.insert(place, pair)
    elif what == "name":
        pair[0] = draw.choice([*WORDS, "a", "b.weight", "層"])
    elif what == "metadata":
        header.insert(place, ["__metadata__", Table([[draw.choice(WORDS), draw.choice(WORDS)]])])
    elif what == "dtype" and "dtype" in fields:
        fields["dtype"][1] = draw.choice(list(DTYPE_BITS))
    elif "shape" in fields and isinstance(shape := fields["shape"][1], list):
        shape[:] = {"flat": [1, *shape, 1], "rank": [*shape, 1, 1, 1, 1], "turn": shape[::-1]}.get(what, [])
    return f"{what} of {dump(pair)[:80]}"


# -- the other files of a checkpoint --------------------------------------------------------------------------------


def json_mutant(raw: bytes, draw: random.Random) -> Mutant:
    table = json.loads(raw, object_pairs_hook=as_table)
    story = "; ".join(mutate_json(draw, list(descent(draw, table))) for _ in range(draw.choice([1, 1, 2, 4])))
    out = dump(table).encode()
    return out, len(out), story


def descent(draw: random.Random, found: Any) -> Iterator[tuple[list[Any], int]]:
    """(list, index) from the outside in to some value: a field is as likely as all of a vocabulary."""
    while isinstance(found, list) and found:
        i = draw.randrange(len(found))
        yield found, i
        found = found[i]


def protobuf_mutant(raw: bytes, draw: random.Random) -> Mutant:
    """Bytes changed, cut out or repeated; often near the end, where it says how the model was trained."""
    out, story = bytearray(raw), []
    for _ in range(draw.choice([1, 1, 2, 5, 30])):
        at = draw.randrange(len(out) if draw.random() < 0.5 else 600)
        at, n = len(out) - 1 - at, draw.choice([1, 1, 1, 1, 2, 8, 200])
        new = draw.choice([draw.randbytes(1), draw.randbytes(1), b"\xff\xff\xff\xff\x0f", out[at : at + n] * 2, b""])
        out[at : at + (n if len(new) != 1 else 1)] = new
        story.append(f"{bytes(new[:16])!r} at {at}")
    return bytes(out), len(out), "; ".join(story)


def safetensors_bombs() -> Iterator[tuple[bytes, str]]:
    """Headers as long as may be, and longer, of what costs Python's JSON most for each byte."""

    def file(header: str, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header.encode() + data

    n = MAX_HEADER_BYTES
    for json_text, story in json_bombs(n):
        yield file(json_text), story
    one = '"%05x":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    for most in (MAX_TENSORS, 2 * MAX_TENSORS - 4096):
        yield file("{" + ",".join(one % (i, i, i + 1) for i in range(most)) + "}", bytes(most)), f"{most} tensors"
    yield file("{" + " " * (100 << 20) + "}"), "100 MB of header"
    yield file("[" * (100 << 20)), "100 MB of nesting"


def json_bombs(n: int) -> Iterator[tuple[str, str]]:
    """JSON texts of at most n bytes, each with as many values of one sort as the readers let pass, and deeper ones."""
    parts = ["[]", "{}", '{"":0}', '"ā"', '"\\u0101"', '"ā%07x"', '"%07x":0', "257", "1e9", "-1", "1" * 4000]
    for part in (*parts, "[" * 99 + "]" * 99):
        one = (part.replace("%07x", "0000000") + ",").encode()
        most = min(n // len(one), MAX_JSON_COST_BYTES // sum(c * one.count(s) for s, c in JSON_COSTS.items())) - 1000
        left, right = ("{", "}") if part.endswith(":0") else ("[", "]")
        values = (part % i for i in range(most)) if "%" in part else [part] * most
        yield '{"a":' + left + ",".join(values) + right + "}", f"{most} times {part[:20]}"
    yield '{"a":"' + "a" * (n - 12) + '😀"}', "a text that Python keeps in four bytes for each character"
    yield '{"a":[' + "[]," * (n // 4) + "0]}", f"{n // 4} lists"
    yield '{"":' * (n // 4), "nested objects"
    yield "[" * n, "nested lists"


# -- the child process --------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> None:
    file = GGUFFile(path)
    for name in file.tensors:
        touch(file.rows(name))
    for found in file.metadata.values():
        if not isinstance(found.data, bool | int | float) and len(found.data):
            assert found.data[0] is not None
            assert found.data[len(found.data) - 1] is not None


def read_safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.tensors:
        with contextlib.suppress(FileFormatError):  # no floats
            touch(file.rows(name))


def touch(rows: np.ndarray) -> None:
    if rows.size:
        assert 0 <= int(rows[0, 0]) + int(rows[-1, -1]) <= 510


def read_base(path: Path) -> None:
    from edgelora.base.model import open_base

    base = open_base(path)
    assert base.identity
    assert base.template


def read_checkpoint(path: Path) -> None:
    """Its folder, in which only this file is broken."""
    from edgelora.base.model import open_base

    assert open_base(path.parent).identity


def spin(_: Path) -> None:
    while True:
        pass


def hoard(path: Path) -> None:
    assert bytes(MEMORY_BYTES + 2 * path.stat().st_size + (8 << 20))


READERS: dict[str, Callable[[Path], object]] = {
    "gguf": read_gguf, "safetensors": read_safetensors, "base": read_base, "json": read_json,
    "large json": lambda path: read_json(path, LARGE_JSON_BYTES),
    "hf folder": read_checkpoint, "sentencepiece": lambda path: vocabulary_from_folder(path.parent),
    "spin": spin, "hoard": hoard, "untyped": lambda path: {}[path], "die": lambda _: os.abort(),
}  # fmt: skip
MUTATE: dict[str, Callable[[bytes, random.Random], Mutant]] = {  # all others read GGUF
    "safetensors": safetensors_mutant, "hf folder": json_mutant, "sentencepiece": protobuf_mutant,
}  # fmt: skip
BOMBS: dict[str, Callable[[], Iterator[tuple[bytes, str]]]] = {
    "gguf": gguf_bombs,
    "safetensors": safetensors_bombs,
    "json": lambda: ((json_text.encode(), story) for json_text, story in json_bombs(MAX_JSON_BYTES)),
    "large json": lambda: ((json_text.encode(), story) for json_text, story in json_bombs(LARGE_JSON_BYTES)),
}


class TooSlowError(BaseException):
    """The CPU time is used up. No Exception, so that no reader catches it."""


def on_alarm(*_: object) -> None:
    raise TooSlowError


def child(reader: str, source: str, scratch: Path, first: int, count: int) -> None:
    """Print two lines for each mutant: its story, and what came of it."""
    import resource

    signal.signal(signal.SIGPROF, on_alarm)
    page = resource.getpagesize()
    for header, size, story in mutants(reader, source, first, count):
        print(json.dumps(story), flush=True)
        scratch.unlink(missing_ok=True)
        scratch.write_bytes(header)
        os.truncate(scratch, size)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * page
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES + 2 * size, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            READERS[reader](scratch)
            outcome = OPENS
        except EdgeloraError as e:
            printable = all(c.isprintable() or c == "\n" for c in str(e))  # a name may try to steer the terminal
            outcome = REFUSED if printable else f"an error that cannot be printed: {e!r}"
        except TooSlowError:
            outcome = f"more than {CPU_S} s of CPU"
        except BaseException as e:
            outcome = f"{type(e).__name__}: {e}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(json.dumps(outcome), flush=True)


def mutants(reader: str, source: str, first: int, count: int) -> Iterator[Mutant]:
    if source == "bombs":
        yield from ((bomb, len(bomb), story) for bomb, story in BOMBS[reader]())
        return
    whole = Path(source).read_bytes()
    for seed in range(first, first + count):
        header, size, story = MUTATE.get(reader, gguf_mutant)(whole, random.Random(seed))
        yield header, size, f"seed {seed}: {story}"


# -- the tests ----------------------------------------------------------------------------------------------------

OPENS, REFUSED = "opens", "typed error"


def outcomes(reader: str, source: Path | str, scratch: Path, count: int = 1) -> Counter[str]:
    """How many mutants ended how. Fails with the story of each that neither opens nor is a typed error."""
    command = [sys.executable, __file__, reader, str(source), str(scratch), "0", str(count)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the count
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=200, check=False)
    except subprocess.TimeoutExpired as e:  # asleep: the limits are of CPU
        pytest.fail(f"{(e.stdout or b'the start').splitlines()[-1].decode()} -> no answer")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    pairs = list(zip(lines[::2], lines[1::2], strict=False))
    faults = [f"{story} -> {outcome}" for story, outcome in pairs if outcome not in (OPENS, REFUSED)]
    if done.returncode:
        faults.append(f"{lines[-1] if lines else 'the start'} -> died with {done.returncode}: {done.stderr[-2000:]}")
    assert not faults, "\n".join(faults)
    return Counter(outcome for _, outcome in pairs)


def check_mutants(reader: str, source: Path, scratch: Path, count: int) -> None:
    found = outcomes(reader, source, scratch, count)
    assert found.total() == count
    assert min(found[OPENS], found[REFUSED]) > count // 20, f"they are all alike and prove nothing: {found}"


@pytest.fixture(params=["tiny", "stories260K"])
def gguf_file(request: pytest.FixtureRequest) -> Path:
    if request.param == "tiny":
        return Path(request.getfixturevalue("make_tiny")(GGMLQuantizationType.Q4_K).path)
    return Path(request.getfixturevalue("shared_data") / "models" / "stories260K" / "stories260K-f32.gguf")


@pytest.fixture(params=["adapter", "stories260K"])
def safetensors_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "stories260K":
        return Path(request.getfixturevalue("shared_data") / "models" / "stories260K" / "model.safetensors")
    prefix, path = "base_model.model.model.layers", tmp_path / "adapter_model.safetensors"
    parts = {f"{prefix}.{i}.self_attn.{p}_proj": (8, 64) for i in range(2) for p in "qv"}
    tensors = {f"{name}.lora_A.weight": np.ones((r, d), np.float32) for name, (r, d) in parts.items()}
    tensors |= {f"{name}.lora_B.weight": np.ones((d, r), np.float16) for name, (r, d) in parts.items()}
    save_file(tensors | {"steps": np.arange(3)}, path, metadata={"format": "pt"})
    return path


def test_gguf_mutants(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    parts = take_apart(whole)
    assert whole[: -parts.data_bytes] == parts.render()  # nothing changes where nothing is changed
    check_mutants("gguf", gguf_file, tmp_path / "mutant", count=2000)


def test_safetensors_mutants(safetensors_file, tmp_path):
    check_mutants("safetensors", safetensors_file, tmp_path / "mutant", count=2000)


@pytest.mark.parametrize(
    ("reader", "within_the_limits"), [("gguf", 5), ("safetensors", 1), ("json", 13), ("large json", 13)]
)
def test_bombs(tmp_path, reader, within_the_limits):
    found = outcomes(reader, "bombs", tmp_path / "bomb")
    assert found[OPENS] == within_the_limits
    assert found[REFUSED] >= 3


@pytest.mark.parametrize(
    ("reader", "fault"),
    [("spin", "more than 2.0 s of CPU"), ("hoard", "MemoryError"), ("untyped", "KeyError"), ("die", "died with -6")],
)
def test_a_breach_is_told_with_its_story(tiny, tmp_path, reader, fault):
    with pytest.raises(AssertionError, match=rf"seed 0: .* -> {fault}"):
        outcomes(reader, tiny.path, tmp_path / "mutant")


def test_base_mutants(tiny, tmp_path):
    check_mutants("base", tiny.path, tmp_path / "mutant", count=600)


@pytest.fixture
def checkpoint(shared_data: Path, tmp_path: Path) -> Path:
    """stories260K in two shards, its tokenizer in JSON."""
    stories, folder = shared_data / "models" / "stories260K", tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((stories / name).read_bytes())
    tensors = load_file(stories / "model.safetensors")
    shard_of = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors.index.json"]
)
def test_mutants_of_a_checkpoint(checkpoint, tmp_path, name):
    (checkpoint / name).rename(tmp_path / name)
    check_mutants("hf folder", tmp_path / name, checkpoint / name, count=300)


def test_sentencepiece_mutants(shared_data, tmp_path):
    check_mutants(
        "sentencepiece", shared_data / "models" / "stories260K" / "tokenizer.model", tmp_path / "tokenizer.model", 500
    )


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
