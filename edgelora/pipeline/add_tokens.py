"""A base → the same with more tokens in its vocabulary, checked: for token rows that are trained for ids of their own.

The result is held to two things: each new token is one id in llama.cpp, wherever it stands, and computes there what it
does in torch; and of a text without them, the logits of all earlier ids are those of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.add_tokens import write_with_tokens
from converters.add_tokens_to_hf import write_folder_with_tokens
from converters.untie import require_tied
from edgelora.base.head import Head
from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.data.encode import Example
from edgelora.data.new_tokens import Grown, with_tokens
from edgelora.errors import ConfigError, ExportError
from edgelora.evaluate.fidelity import Fidelity, Tally
from edgelora.evaluate.thresholds import FLOATS, Limits, limits_of
from edgelora.files.atomic import refuse_existing, require_space
from edgelora.pipeline.certificate import Output, Reference, stamp, types_of, write_certified
from edgelora.pipeline.check_rows import CHECK_TEXTS
from edgelora.pipeline.compare import InLlamaCpp, in_llama_cpp, logits, stepper
from edgelora.pipeline.said import ROW_TOKENS, Group, Said
from edgelora.pipeline.tokenize import check, tokenize_text
from edgelora.pipeline.torch_states import torch_states
from edgelora.progress import OnProgress, silent

TOKENS_IN_A_TEXT = 8  # the ids of all new tokens are compared, the logits of one such text


@dataclass(frozen=True)
class TokensCertificate:
    """What was compared. Ids that llama.cpp gives otherwise are a CertificateError before there is one."""

    n_ids: int
    """How many ids of texts with and without the new tokens llama.cpp gives as we do."""
    own: Fidelity | None
    """llama.cpp against torch over the file, new tokens among what is said; None for a checkpoint."""
    before: Fidelity
    """The logits of earlier ids against the base's, in llama.cpp both; in torch both of checkpoints."""
    same_bits: bool
    """Whether these are equal bit for bit."""
    limits: Limits
    """Of `own`."""

    @property
    def faults(self) -> list[str]:
        own = [] if self.own is None else [f"llama.cpp against torch: {f}" for f in self.limits.faults(self.own)]
        # both sides round their activations alike, whatever the weights are: no type's allowance is due here
        return [*own, *(f"against the base, on earlier ids: {fault}" for fault in FLOATS.faults(self.before))]

    @property
    def sentence(self) -> str:
        """For who waits for the file."""
        earlier = "bit for bit" if self.same_bits else f"but for rounding (mean KL {self.before.kl_mean:.2g})"
        own = "" if self.own is None else f"llama.cpp computes what torch does (mean KL {self.own.kl_mean:.2g}); "
        return f"checked: llama.cpp gives the same {self.n_ids} ids; {own}earlier ids have the base's logits, {earlier}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": not self.faults, "equal_ids": self.n_ids, "same_bits": self.same_bits,
            "fidelity": self.own.as_dict() if self.own else None, "loss": self.before.as_dict(),
            "kl_limit": self.limits.kl_mean, "same_top_limit": self.limits.same_top, "loss_limit": FLOATS.kl_mean,
        }  # fmt: skip


@dataclass(frozen=True)
class Enlarged:
    """What was written: each new token with its id and the ids that its text had before; how many ids there are, and
    how many of these are padding behind the new ones."""

    path: Path
    tokens: dict[str, int]
    pieces: tuple[tuple[int, ...], ...]
    vocab_size: int
    padding: int
    size_bytes: int
    notes: list[str]
    certificate: TokensCertificate
    needs_untying: bool
    """Whether rows that are trained over it leave as an adapter once it has a head of its own, and not before."""


def add_tokens(
    base_path: Path,
    texts: Sequence[str],
    out: Path,
    *,
    control: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Enlarged:
    """Write the base at `base_path` to `out` with these tokens: a GGUF to a file, a checkpoint to a folder.

    Raises ConfigError for texts that cannot be new tokens, and CertificateError, what was written kept aside, if
    llama.cpp reads them otherwise or computes something else.
    """
    made_from, base = stamp(base_path), open_base(base_path)
    if not base.is_gguf and out.suffix == ".gguf":
        raise ConfigError(
            what=f"--out {out}: a Hugging Face folder becomes a folder",
            why="its tensors and files stay what they are",
            fix=f"name a folder, and then `edgelora convert` it; or convert {base_path} first and add to that",
        )
    refuse_existing(out, overwrite, folder=not base.is_gguf)
    grown = with_tokens(base.tokenizer, texts, control=control, source=base_path)
    size = sum(path.stat().st_size for path in base.source.files)
    require_space(out.parent, size // len(base.tokenizer.tokens) * len(texts) + size, "the base with these tokens")

    def write(draft: Path) -> None:
        if base.is_gguf:
            write_with_tokens(draft, base, grown, on_progress)
        else:
            write_folder_with_tokens(draft, base, grown, control=control, on_progress=on_progress)

    certificate = write_certified(
        Output(out, overwrite, folder=not base.is_gguf), made_from, write,
        lambda draft: certify(draft, base_path, grown, on_progress),
    )  # fmt: skip
    files, written = [out] if out.is_file() else sorted(out.iterdir()), open_base(out)
    return Enlarged(
        out, dict(zip(grown.texts, grown.ids, strict=True)), grown.pieces, grown.n_tokens, grown.padding,
        sum(file.stat().st_size for file in files), _notes(written, grown), certificate, _needs_untying(written),
    )  # fmt: skip


def _notes(written: Base, grown: Grown) -> list[str]:
    """A folder cannot say of some names that they are no control tokens."""
    kinds = written.vocabulary.types
    other = [t for t, i in zip(grown.texts, grown.ids, strict=True) if kinds[i] != grown.vocabulary.types[i]]
    return [
        f"{text!r} is a control token once this is a GGUF: its name looks like one to llama.cpp's converter"
        for text in other
    ]


def _needs_untying(written: Base) -> bool:
    """Of a tied GGUF, in a family of which llama.cpp reads a head too."""
    if not written.is_gguf:
        return False
    try:
        require_tied(written)
    except ExportError:
        return False
    return True


def certify(draft: Path, base_path: Path, grown: Grown, on_progress: OnProgress = silent) -> TokensCertificate:
    """Compare the model at `draft` with the base it was made from, in child processes.

    Raises CertificateError, naming the first one, if llama.cpp gives an id otherwise.
    """
    written, base = open_base(draft), open_base(base_path)
    n_ids = sum(_same_ids(written, grown, special, on_progress) for special in (True, False))
    groups, models = Said.read(base, base.context, None).groups, [Reference(draft)]
    if written.is_gguf:
        groups = [*groups, [_example(written, grown)]]
    else:
        models.append(Reference(base_path))
    examples = [example for group in groups for example in group]
    states = run_in_child(torch_states, models, examples, with_torch=True, on_progress=on_progress)
    compared = run_in_child(_compare, (draft, base_path), grown.ids, groups, states, on_progress=on_progress)
    return TokensCertificate(n_ids, *compared, limits_of(types_of(draft)))


def _same_ids(written: Base, grown: Grown, special: bool, on_progress: OnProgress) -> int:
    """How many ids llama.cpp gives as we do, of texts with every new token and of others; all do, or it raises."""
    some = range(0, len(grown.texts), TOKENS_IN_A_TEXT)
    said = [*CHECK_TEXTS, *(_text_with(grown.texts[first : first + TOKENS_IN_A_TEXT]) for first in some)]
    rows = [tokenize_text(written, text, parse_special=special) for text in said]
    return check(written, rows, parse_special=special, on_progress=on_progress)


def _text_with(texts: Sequence[str]) -> str:
    return f"The words {', '.join(texts)} mean:{''.join(texts)}"


def _example(written: Base, grown: Grown) -> Example:
    """Some of the new tokens between others, to be computed."""
    ids = tokenize_text(written, _text_with(grown.texts[:TOKENS_IN_A_TEXT]), parse_special=True).ids
    ids = ids[: min(written.context, ROW_TOKENS)]
    return Example(np.array(ids), np.arange(len(ids)) > 0)


# -- in a child ---------------------------------------------------------------------------------------------------


class _Earlier:
    """The logits of all ids but the new ones, of the base and of what was made of it, as they come."""

    def __init__(self, new: Sequence[int]) -> None:
        self.new, self.tally, self.same_bits = list(new), Tally(), True

    def add(self, base: np.ndarray, written: np.ndarray) -> None:
        taken = [token for token in self.new if token < base.shape[1]]  # padding of the base until now
        base, written = np.delete(base, taken, 1), np.delete(written[:, : base.shape[1]], taken, 1)
        self.same_bits &= np.array_equal(base, written)
        self.tally.add(base, written)


def _compare(
    models: tuple[Path, Path],
    new: Sequence[int],
    groups: Sequence[Group],
    states: Sequence[np.ndarray],
    on_progress: OnProgress,
) -> tuple[Fidelity | None, Fidelity, bool]:
    """llama.cpp over the first of the models against torch over it; and its earlier ids against the second's."""
    written, base = (open_base(path) for path in models)
    earlier, step = _Earlier(new), stepper(len(groups), on_progress)
    if not written.is_gguf:
        sides = list(zip((Head(written), Head(base)), states, strict=True))
        for _, (here, then) in logits(lambda _: None, sides, groups, step):
            earlier.add(then, here)
        return None, earlier.tally.found(), earlier.same_bits
    own = Tally()
    with in_llama_cpp(written, groups) as now, in_llama_cpp(base, groups) as before:

        def run(group: Group) -> np.ndarray:
            found = InLlamaCpp(now).logits(group)
            if not any(np.isin(example.input_ids, new).any() for example in group):
                earlier.add(InLlamaCpp(before).logits(group), found)
            return found

        for there, (here,) in logits(run, [(Head(written), states[0])], groups, step):
            assert there is not None
            own.add(here, there)
    return own.found(), earlier.tally.found(), earlier.same_bits
