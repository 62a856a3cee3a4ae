"""Adapter → checked GGUF: convert, compare torch with llama.cpp on the same tokens, sign, and only then name it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from converters.adapter_to_gguf import write_adapter_gguf
from converters.soft_prompt_to_gguf import write_soft_prompt_gguf
from edgelora.base.model import FLOAT_QUANTS, Base, open_base
from edgelora.data.conversation import Conversation
from edgelora.errors import AdapterError
from edgelora.evaluate.fidelity import Fidelity
from edgelora.evaluate.thresholds import FLOATS
from edgelora.files.atomic import refuse_existing, write_text
from edgelora.files.contract import FILE_NAME, Contract, contract_in, fault_and_contract, require_its_base
from edgelora.peft.adapter import Adapter, look_at, unfit
from edgelora.peft.soft_prompt import TrainedPrompt, is_trained_prompt, read_trained_prompt
from edgelora.pipeline.certificate import Output, stamp, write_certified
from edgelora.pipeline.check_rows import CHECKED_ROWS, rows_to_check
from edgelora.pipeline.said import SHORTEST
from edgelora.pipeline.side_by_side import SideBySide, side_by_side
from edgelora.pipeline.soft_export import SoftCheck
from edgelora.pipeline.torch_states import Reference
from edgelora.progress import OnProgress, silent

# Over float weights the limits are those of float models. Over a quantized base llama.cpp rounds activations to 8 bits.
# That noise is measured on the base without the adapter, and the adapter's must be like it: measured ratios on
# SmolLM2-135M are 0.3 to 1.6, a wrong rotary permutation gives over 20.
NOISE_RATIO, NOISE_FLOOR, SAME_TOP_SLACK = 3.0, 2e-3, 0.05
CHANCE = 3.0  # standard errors that a right file may lie below: fewer than 4 in 1000 lie further, few tokens or many


@dataclass(frozen=True)
class Certificate:
    """What was compared and what came out. `floor` is torch against llama.cpp on the base without the adapter."""

    base_quant: str
    n_prompts: int
    equal_ids: int
    floor: Fidelity
    adapter: Fidelity
    kl_limit: float
    same_top_limit: float

    @property
    def faults(self) -> list[str]:
        found, faults = self.adapter, []
        if self.equal_ids != self.n_prompts:
            faults.append(f"{self.n_prompts - self.equal_ids} of {self.n_prompts} rows have other token ids")
        if not found.kl_mean <= self.kl_limit:
            faults.append(f"mean KL {found.kl_mean:.2g}, allowed {self.kl_limit:.2g}")
        tied = self.base_quant in FLOAT_QUANTS and found.worst_flip_nats <= FLOATS.flip_nats
        if not (found.same_top >= self.same_top_limit or tied):
            faults.append(f"same top {found.same_top:.1%}, allowed {self.same_top_limit:.1%}")
        return faults

    @property
    def passed(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed, "base_quant": self.base_quant, "n_prompts": self.n_prompts,
            "equal_ids": self.equal_ids, "floor": self.floor.as_dict(), "adapter": self.adapter.as_dict(),
            "kl_limit": self.kl_limit, "same_top_limit": self.same_top_limit,
        }  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """What is asked of every door that has a certificate of its own."""

    dtype: str = "F16"
    """Numbers of a LoRA: F16, F32 or Q8_0."""
    data: Path | None = None
    """Rows whose prompts and answers are compared; a few built-in ones without it."""
    n_rows: int = CHECKED_ROWS
    """How many of these rows: the first ones."""
    allow_unverified: bool = False
    """Whether an adapter may come that does not name its base."""
    overwrite: bool = False


DEFAULT_OPTIONS = ExportOptions()


def export(
    base_path: Path,
    adapter_path: Path,
    out: Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    on_progress: OnProgress = silent,
) -> Certificate:
    """Write `out`, a GGUF LoRA for llama.cpp or what edgelora's engine puts before prompts.

    Returns its certificate, which is also kept inside and in the adapter's edgelora.json.
    Raises CertificateError, and keeps the file aside as `out`.rejected, if llama.cpp does not compute what torch
    computes; BaseModelError if the base is a checkpoint.
    """
    refuse_existing(out, options.overwrite)
    made_from, result = stamp(base_path, adapter_path), Output(out, options.overwrite)
    base, rows = open_base(base_path), rows_to_check(options.data, options.n_rows)
    _ = base.file  # what is written is compared over it in llama.cpp: a checkpoint is refused before the work
    dtype, allowed = options.dtype, options.allow_unverified
    if is_trained_prompt(adapter_path):
        prompt = read_checked_prompt(adapter_path, base, allow_unverified=allowed)
        if base.context < prompt.length + SHORTEST:
            raise AdapterError(
                what=f"{adapter_path}: its {prompt.length} positions leave no room for a prompt and an answer",
                why=f"the base sees {base.context} tokens in all",
                fix="train fewer virtual tokens",
            )
        contract, spoken = prompt.contract, base.as_trained(prompt.contract)
        check = SoftCheck(spoken, adapter_path, prompt.length, rows)
        states = check.states(on_progress)
        certificate = write_certified(
            result,
            made_from,
            lambda draft: write_soft_prompt_gguf(draft, prompt, base, out.stem, states.reference),
            lambda draft: judged(base, len(rows), *check.compare(draft, states, on_progress)),
        )
    else:
        adapter = read_checked(adapter_path, base, allow_unverified=allowed, may_wait=True, with_rows=True)
        contract = adapter.contract
        certificate = write_certified(
            result,
            made_from,
            lambda draft: write_adapter_gguf(draft, adapter, base, out.stem, dtype),
            lambda draft: certify_adapter(base_path, adapter_path, draft, rows, on_progress, coarse=dtype == "Q8_0"),
        )
    if contract is not None:
        signed = contract.model_copy(update={"certificate": certificate.as_dict()})
        write_text(adapter_path / FILE_NAME, signed.model_dump_json(indent=2) + "\n", overwrite=True)
    return certificate


def read_checked(
    path: Path, base: Base, *, allow_unverified: bool, may_wait: bool = False, with_rows: bool = False
) -> Adapter:
    """Read an adapter folder and hold it to its contract with `base`: one AdapterError for all that is wrong with both.
    may_wait: whether it may be an aLoRA; with_rows: or new rows of tokens."""
    adapter, faults = look_at(path, base.layers, may_wait=may_wait, may_have_rows=with_rows)
    require = partial(require_contract, path=path, base=base, allow_unverified=allow_unverified)
    if faults:
        raise fault_and_contract(unfit(path, faults), path, lambda: adapter.contract, require)
    require(adapter.contract)
    return adapter


def read_checked_prompt(path: Path, base: Base, *, allow_unverified: bool) -> TrainedPrompt:
    """The same of what stands before prompts."""
    require = partial(require_contract, path=path, base=base, allow_unverified=allow_unverified)
    try:
        prompt = read_trained_prompt(path, base.config)
    except AdapterError as fault:
        raise fault_and_contract(fault, path, lambda: contract_in(path), require) from None
    require(prompt.contract)
    return prompt


def require_contract(contract: Contract | None, path: Path, base: Base, *, allow_unverified: bool) -> None:
    """Raise AdapterError if the adapter at `path` was made for another base, or names none and that is not allowed."""
    identity = base.as_trained(contract).identity
    require_its_base(contract, identity, path, base.path, allow_unverified=allow_unverified)


def certify_adapter(
    base_path: Path,
    adapter_path: Path,
    gguf: Path,
    rows: Sequence[Conversation],
    on_progress: OnProgress,
    *,
    coarse: bool = False,
) -> Certificate:
    """torch and llama.cpp on the same tokens, in child processes: first the bare base, then with the adapter.

    coarse: whether its numbers in the file are blocks, which a float base shows.
    """
    adapted = Reference(base_path, ((adapter_path, 1.0),))
    equal, (floor, own) = side_by_side(SideBySide(base_path, gguf, (adapted,), rows), on_progress)
    return judged(open_base(base_path), len(rows), equal, floor, own, coarse=coarse)


def judged(
    base: Base, n_prompts: int, equal_ids: int, floor: Fidelity, adapter: Fidelity, *, coarse: bool = False
) -> Certificate:
    """What was found, and the limits for this base: `floor` is torch against llama.cpp without the adapter."""
    exact = base.quant in FLOAT_QUANTS and not coarse
    return Certificate(
        base_quant=base.quant,
        n_prompts=n_prompts,
        equal_ids=equal_ids,
        floor=floor,
        adapter=adapter,
        kl_limit=FLOATS.kl_mean if exact else max(NOISE_FLOOR, NOISE_RATIO * floor.kl_mean),
        same_top_limit=FLOATS.same_top if exact else floor.same_top - same_top_slack(floor),
    )


def same_top_slack(floor: Fidelity) -> float:
    """How far below the bare base's same top the adapter's may be: SAME_TOP_SLACK, or what chance does to few tokens.

    Both are shares of the same `n_tokens` positions, and where two tokens are near a tie either is a draw. The standard
    error of their difference is taken at the centre of Wilson's interval (1927): at 10 of 10 it is not 0.
    """
    n = floor.n_tokens
    share = (floor.same_top * n + CHANCE**2 / 2) / (n + CHANCE**2)
    return max(SAME_TOP_SLACK, CHANCE * math.sqrt(2 * share * (1 - share) / n))
