"""Perplexity of the torch decoder against llama.cpp's, over the same file and the same windows of a text."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.base_to_gguf import write_base_gguf
from edgelora.base.model import Base, open_base
from edgelora.device import physical_cores
from edgelora.evaluate.perplexity import Perplexity, Window, nll_of, perplexity, windows
from runtime.binding import Context, Entry, Model


@dataclass(frozen=True)
class Parity:
    """One model's perplexities: in torch over its own blocks, in llama.cpp, and in llama.cpp over its F16 form.

    llama.cpp rounds activations to 8 bits over quantized weights, not over F16: torch must equal that one closely.
    """

    model: str
    quant: str
    torch: Perplexity
    llama_cpp: Perplexity
    llama_cpp_f16: Perplexity

    @property
    def against_file(self) -> float:
        """How much higher torch's perplexity is than llama.cpp's over the same file, as a share of it."""
        return self.torch.value / self.llama_cpp.value - 1

    @property
    def against_f16(self) -> float:
        """How much higher it is than llama.cpp's over the F16 form, as a share of that."""
        return self.torch.value / self.llama_cpp_f16.value - 1


def text_windows(base: Base, text: str, size: int, chunks: int) -> list[Window]:
    """The windows of a text as llama-perplexity cuts them: one newline at its end removed, BOS if the model adds it."""
    tokenizer = base.tokenizer
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    text, enough = text.removesuffix("\n"), (chunks + 1) * size
    characters = 4 * enough
    while len(ids := tokenizer.encode(text[:characters]).ids) < enough and characters < len(text):
        characters *= 2
    return windows(ids if bos is None else [bos, *ids], size, bos, chunks)


def torch_perplexity(base: Base, parts: list[Window]) -> Perplexity:
    """Of the windows, by torch over the file's own weights."""
    import torch

    from edgelora.base.decoder import build_decoder

    torch.set_num_threads(physical_cores())
    decoder = build_decoder(base)

    def nll(window: Window) -> np.ndarray:
        ids = torch.from_numpy(window.ids)
        with torch.no_grad():
            hidden = decoder(ids, torch.arange(len(ids)), [0, len(ids)])
            return decoder.nll(hidden[window.first - 1 : -1], ids[window.first :]).numpy()

    return perplexity(parts, nll)


def llama_cpp_perplexity(path: Path, parts: list[Window], exact: bool = False) -> Perplexity:
    """Of the windows, by llama.cpp; `exact`: with keys and values in F32 and no flash attention."""
    size = len(parts[0].ids)
    with (
        closing(Model(path)) as model,
        closing(
            Context(model, n_ctx=size, n_sequences=1, threads=physical_cores(), n_batch=size, exact=exact)
        ) as context,
    ):

        def nll(window: Window) -> np.ndarray:
            context.clear()
            wanted = range(window.first - 1, size - 1)
            entries = [Entry(token, i, 0, i in wanted) for i, token in enumerate(window.ids.tolist())]
            return nll_of(context.decode(entries), window.targets)

        return perplexity(parts, nll)


def parity(path: Path, text: str, size: int = 512, chunks: int = 16) -> Parity:
    """Compare torch and llama.cpp over the first `chunks` windows of `size` tokens of `text`."""
    base = open_base(path)
    parts = text_windows(base, text, size, chunks)
    ours = torch_perplexity(base, parts)
    with tempfile.TemporaryDirectory() as room:
        f16 = Path(room) / "f16.gguf"
        write_base_gguf(f16, base, "F16")
        theirs_f16 = llama_cpp_perplexity(f16, parts)
    theirs = llama_cpp_perplexity(base.path, parts) if base.is_gguf else theirs_f16
    return Parity(path.name, base.quant, ours, theirs, theirs_f16)
