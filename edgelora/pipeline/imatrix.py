"""A model's importance matrix, computed on the user's own rows with the adapter on: what quantizing must spare."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.adapter_to_gguf import write_adapter_gguf
from converters.imatrix import Importance, write_importance
from edgelora.base.activations import ActivationSums
from edgelora.base.model import FLOAT_QUANTS, Base, open_base
from edgelora.child import run_in_child
from edgelora.data.calibration import Mix, calibrate
from edgelora.device import Choice, compute_threads
from edgelora.errors import AdapterError, ConfigError
from edgelora.files.adapter_check import check_adapter, contract_of
from edgelora.files.atomic import refuse_existing, staged
from edgelora.files.contract import require_same_base
from edgelora.files.gguf import GGUFFile
from edgelora.files.unchanged import stamp
from edgelora.peft.adapter import Adapter
from edgelora.pipeline.export import read_checked
from edgelora.pipeline.foreign import Foreign, open_model
from edgelora.progress import OnProgress, Pace, Progress, silent

__all__ = ["Computed", "Mix", "Settings", "compute_importance"]

LLAMA_CPP, TORCH = "llama.cpp", "torch"
HEAD, EMBEDDING = "output.weight", "token_embd.weight"

Scaled = tuple[Path, float]


@dataclass(frozen=True)
class Settings:
    """engine: `auto`, `llama.cpp` or `torch`. output: watch the head too, which llama-imatrix leaves out by default.
    template: a chat template for a model without one: `chatml`, or a Jinja file."""

    mix: Mix
    engine: str = "auto"
    output: bool = False
    template: str | None = None
    allow_unverified: bool = False


@dataclass(frozen=True)
class Computed:
    """The file that was written, how it was computed, and what its user should know about it."""

    path: Path
    importance: Importance
    engine: Choice
    task_tokens: int
    general_tokens: int
    notes: list[str]
    quantizable: bool
    """Whether `edgelora quantize` and `merge` take the model's weights as they are: 16-bit ones, of a known family."""


def compute_importance(
    model: Path,
    adapters: Sequence[Scaled],
    out: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Computed:
    """Write the importance matrix of `model`, with these adapters (PEFT folders or GGUF files) on it, to `out`.

    Raises what `calibrate` raises; BaseModelError if the model cannot be opened or computes no numbers; ConfigError if
    no engine can do what is asked; AdapterError; EngineError where llama.cpp refuses; OutputError and BaseModelError as
    `Stamps` does.
    """
    refuse_existing(out, overwrite)
    read = (model, *(path for path, _ in adapters), settings.mix.data, settings.mix.text)
    made_from = stamp(*(path for path in read if path is not None))
    made_from.require_apart(out)
    opened = open_model(model)
    engine = choose_engine(settings.engine, opened, adapters)
    tokens = calibrate(settings.mix, _speaking(opened, adapters, settings))
    torch = engine.value != LLAMA_CPP
    sums = run_in_child(
        _by_torch if torch else _by_llama_cpp, model, adapters, settings, tokens.sequences, with_torch=torch,
        on_progress=on_progress,
    )  # fmt: skip
    n_tokens, window = tokens.task_tokens + tokens.general_tokens, settings.mix.window
    importance = Importance(
        sums={name: values.astype(np.float32) for name, values in sums.sums.items()},
        counts=sums.counts,
        chunks=max(1, n_tokens // window),
        chunk_tokens=window,
        datasets=tuple(path.name for path in (settings.mix.data, settings.mix.text) if path is not None),
    )
    with staged(out, overwrite=overwrite) as draft:
        write_importance(draft, importance)
        made_from.require_unchanged()
    return Computed(
        out, importance, engine, tokens.task_tokens, tokens.general_tokens, _notes(importance),
        quantizable=isinstance(opened, Base) and opened.quant in FLOAT_QUANTS,
    )  # fmt: skip


def choose_engine(asked: str, opened: Base | Foreign, adapters: Sequence[Scaled]) -> Choice:
    """Which of the two computes. Raises ConfigError if the one asked for cannot."""
    faults = {LLAMA_CPP: _not_in_llama_cpp(opened, adapters), TORCH: _not_in_torch(opened, adapters)}
    if asked != "auto" and asked not in faults:
        raise ConfigError(f"--engine {asked}", "there is none of that name", f"pass one of auto, {', '.join(faults)}")
    able = [engine for engine, fault in faults.items() if fault is None and asked in ("auto", engine)]
    if not able:
        raise ConfigError(
            what="no engine can compute this importance matrix" if asked == "auto" else f"--engine {asked}",
            why="; ".join(f"{e}: {fault}" for e, fault in faults.items() if fault and asked in ("auto", e)),
            fix="pass --engine auto, or a GGUF model with an adapter that `edgelora export` made for it",
        )
    if asked != "auto":
        return Choice(asked, "asked for")
    other = faults[TORCH if able[0] == LLAMA_CPP else LLAMA_CPP]
    return Choice(able[0], other or "it runs this very file")


def _not_in_llama_cpp(opened: Base | Foreign, adapters: Sequence[Scaled]) -> str | None:
    if isinstance(opened, Base) and not opened.is_gguf:
        return "a Hugging Face checkpoint is no GGUF file"
    folders = [path for path, _ in adapters if path.is_dir()]
    if folders and isinstance(opened, Foreign):
        return f"{folders[0]} is an adapter in PEFT's format for a family that edgelora does not know"
    for path in folders:
        if isinstance(opened, Base) and (title := _more_than_a_lora(path, opened)):
            return f"{title} is no adapter of llama.cpp"
    return None


def _not_in_torch(opened: Base | Foreign, adapters: Sequence[Scaled]) -> str | None:
    if isinstance(opened, Foreign):
        return opened.why
    files = [path for path, _ in adapters if not path.is_dir()]
    return f"{files[0]} is an adapter of llama.cpp, or none" if files else None


def _more_than_a_lora(path: Path, base: Base) -> str | None:
    """What the adapter is, where llama.cpp cannot add it to the base; else None."""
    adapter = _read(path, base)
    if (
        not adapter.norms
        and not adapter.vocabularies
        and all(adapter.change(module).is_pair for module in adapter.linears)
    ):
        return None
    return adapter.kind.one


def _read(path: Path, base: Base) -> Adapter:
    return read_checked(path, base, allow_unverified=True)  # one that names no base is judged where it runs


def _speaking(opened: Base | Foreign, adapters: Sequence[Scaled], settings: Settings) -> Base | Foreign:
    """The model with the chat template that was chosen for it, or that its adapter was trained with."""
    if settings.template is not None:
        return opened.with_template(settings.template)
    if isinstance(opened, Base):
        for path, _ in adapters:
            contract = _read(path, opened).contract if path.is_dir() else contract_of(GGUFFile(path))
            opened = opened.as_trained(contract)
    return opened


def _by_torch(
    model: Path,
    adapters: Sequence[Scaled],
    settings: Settings,
    sequences: Sequence[np.ndarray],
    on_progress: OnProgress,
) -> ActivationSums:
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.base.importance import collect_importance
    from edgelora.peft.blend import blend

    base = open_base(model)
    torch.set_num_threads(compute_threads())
    decoder = build_decoder(base)
    blend(decoder, [(read_checked(path, base, allow_unverified=settings.allow_unverified), s) for path, s in adapters])
    pace = Pace(len(sequences))

    def say(tokens: int) -> None:
        speed, eta = pace.step(tokens)
        on_progress(Progress("imatrix", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

    return collect_importance(decoder, base, sequences, settings.output, say)


def _by_llama_cpp(
    model: Path,
    adapters: Sequence[Scaled],
    settings: Settings,
    sequences: Sequence[np.ndarray],
    on_progress: OnProgress,
) -> ActivationSums:
    from runtime.importance import collect_importance

    opened = open_model(model)
    file = opened.file
    with tempfile.TemporaryDirectory() as room:
        ready = []
        for number, (path, scale) in enumerate(adapters):
            if isinstance(opened, Base) and path.is_dir():
                adapter: Adapter = read_checked(path, opened, allow_unverified=settings.allow_unverified)
                written = Path(room) / f"{number}.gguf"
                write_adapter_gguf(written, adapter, opened, path.name, "F32")
            else:
                written = _checked_gguf(path, opened, file, settings.allow_unverified)
            ready.append((written, scale))
        return collect_importance(file.path, ready, sequences, _watched(file, settings.output), on_progress)


def _watched(file: GGUFFile, output: bool) -> dict[str, int]:
    """The matrices of a file that llama-imatrix watches, with how many experts are stacked in each; and the head."""
    head = HEAD if HEAD in file.tensors else EMBEDDING
    return {
        name: info.shape[0] if len(info.shape) > 2 else 1
        for name, info in file.tensors.items()
        if len(info.shape) > 1 and (name.startswith("blk.") or (output and name == head))
    }


def _checked_gguf(path: Path, opened: Base | Foreign, file: GGUFFile, allow_unverified: bool) -> Path:
    """The path of a GGUF adapter that llama.cpp may see."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    contract = contract_of(check_adapter(path, file.architecture, shapes))
    if contract is not None and isinstance(opened, Base):
        require_same_base(contract, opened.as_trained(contract).identity, str(path), str(opened.path))
    elif not allow_unverified:
        raise AdapterError(
            what=f"{path}: nobody can say whether it belongs to this model",
            why="it was not written by edgelora, or the model is of a family that edgelora does not compute",
            fix="pass --allow-unverified-base if you know that it was trained on this model",
        )
    return path


def _notes(importance: Importance) -> list[str]:
    unseen = importance.unseen()
    if not unseen:
        return []
    total = sum(len(importance.counts[name]) for name in unseen)
    return [
        f"{sum(unseen.values())} of {total} matrices of experts in {len(unseen)} tensors saw no token and are "
        "quantized as without importance: more data reaches more of them"
    ]
