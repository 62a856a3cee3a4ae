"""edgelora: fine-tune a language model on your own machine, over the very GGUF file that llama.cpp will run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgelora.config import TrainConfig as TrainConfig
    from edgelora.training.run import run_training as train

__version__ = "0.1.0"
__all__ = ["TrainConfig", "__version__", "train"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only who trains pays for it
    if name == "train":
        from edgelora.training.run import run_training

        return run_training
    if name == "TrainConfig":
        from edgelora.config import TrainConfig

        return TrainConfig
    raise AttributeError(f"module 'edgelora' has no attribute {name!r}")
