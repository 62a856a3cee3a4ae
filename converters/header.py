"""A GGUF that is all header: what llama.cpp's dry run reads of a checkpoint to choose its types. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from converters.base_to_gguf import FILE_TYPES, plan
from converters.metadata import write_dimensions, write_metadata
from converters.stream import write_header
from edgelora.base.model import Base


def write_header_only(out: Path, base: Base, *, vocabulary: bool = True) -> None:
    """Write to `out` the header that `base` would have as a GGUF of the floats it holds, extended to its whole size.

    What is not header is a hole, which takes no room on the disk. Without `vocabulary`, which decides no type, it is
    written and read many times faster, but no size that is computed from it is that of the file.
    """
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    if vocabulary:
        write_metadata(writer, base, FILE_TYPES[base.quant])
    else:
        write_dimensions(writer, base)
    entries = plan(base, GGMLQuantizationType[base.quant])
    write_header(writer, entries)
    size = out.stat().st_size
    for entry in entries.values():
        size += -size % GGUF_DEFAULT_ALIGNMENT + entry.size_bytes
    os.truncate(out, size + -size % GGUF_DEFAULT_ALIGNMENT)
