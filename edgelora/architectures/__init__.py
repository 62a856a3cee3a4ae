"""One file and one row for each model family. Adding one is a file and a line in THE TABLE below."""

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.architectures.llama import LLAMA

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in (LLAMA,)}

__all__ = ["ARCHITECTURES", "Architecture", "ModelConfig"]
