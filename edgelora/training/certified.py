"""The contract of a fresh adapter: its base, how it was trained, and what it reached."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from typing import Any

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.files.contract import Contract
from edgelora.training.rows import Rows
from edgelora.versions import versions

ELSEWHERE = {
    "base", "data", "valid", "original", "orthogonal_to", "out", "overwrite", "resume", "method", "chat_template",
    "samples",
}  # fmt: skip


def contract_of(
    config: TrainConfig, base: Base, rows: Rows, choices: dict[str, Choice], result: dict[str, Any]
) -> Contract:
    """`config` is the one in which nothing is left open; `result` as run.json has it."""
    dated = base.template_source is not None and base.template.tells_the_date
    return Contract(
        version=versions()["edgelora"],
        base=base.fingerprint,
        base_file=base.base_file,
        tokenizer_sha256=base.tokenizer.sha256,
        chat_template_sha256=base.template_sha256,
        chat_template=base.chosen_template,
        eog_ids=base.tokenizer.eog_ids,
        system=rows.train.system,
        single_turn=rows.train.single_turn,
        method=config.method,
        training={
            **config.model_dump(mode="json", exclude=ELSEWHERE),
            "template_date": date.today().isoformat() if dated else None,
            "data": [asdict(source) for source in rows.sources],
            "choices": {name: asdict(choice) for name, choice in choices.items()},
            **{name: value for name, value in result.items() if not name.endswith("loss")},
        },
        evaluation={name: value for name, value in result.items() if name.endswith("loss")},
        versions=versions(),
    )
