"""What two runs of the same must have in common, and a run that is gone on with from one of its checkpoints."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from conftest import ROOT

from edgelora.config import TrainConfig
from edgelora.training.checkpoint import checkpoint_path
from edgelora.training.run import run_training

spec = importlib.util.spec_from_file_location("kill", ROOT / "benchmarks" / "kill.py")
assert spec is not None
assert spec.loader is not None
kill = importlib.util.module_from_spec(spec)
sys.modules["kill"] = kill  # dataclasses look their module up
spec.loader.exec_module(kill)
outcome, run_folder = kill.outcome, kill.run_folder


def cut_back(out: Path, step: int, micro: int = 0) -> None:
    """As if the run had died behind that checkpoint: no adapter and none later; the lines of later steps stay."""
    shutil.rmtree(out)
    for path in (run_folder(out) / "checkpoints").glob("step-*"):
        if path.name > checkpoint_path(Path(), step, micro).name:
            shutil.rmtree(path)


def require_same_when_resumed(config: TrainConfig, *steps: int) -> None:
    """A run that ended, gone on with from its checkpoint behind each of `steps`, ends as it did, to the bit."""
    wanted = outcome(config.out)
    for step in steps:
        cut_back(config.out, step)
        run_training(config.model_copy(update={"resume": True}))
        assert outcome(config.out) == wanted, f"from step {step}"
