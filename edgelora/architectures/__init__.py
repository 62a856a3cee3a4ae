"""One file and one row for each model family. Adding one is a file and a line in THE TABLE below."""

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.architectures.gemma2 import GEMMA2
from edgelora.architectures.gemma3 import GEMMA3
from edgelora.architectures.granite import GRANITE
from edgelora.architectures.llama import LLAMA
from edgelora.architectures.mistral import MISTRAL
from edgelora.architectures.mixtral import MIXTRAL
from edgelora.architectures.olmo2 import OLMO2
from edgelora.architectures.phi3 import PHI3
from edgelora.architectures.qwen2 import QWEN2
from edgelora.architectures.qwen3 import QWEN3
from edgelora.architectures.qwen3_moe import QWEN3_MOE
from edgelora.architectures.rope import Rope
from edgelora.architectures.smollm3 import SMOLLM3
from edgelora.files.gguf import GGUFFile

ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, SMOLLM3, OLMO2, GRANITE,
    )
}  # fmt: skip


def family_of_gguf(file: GGUFFile) -> Architecture | None:
    """The row that reads a GGUF: by its architecture, and by whether it has experts. None if there is no such row."""
    has_experts = file.get(f"{file.architecture}.expert_count", int, 0) > 0
    fitting = (
        row for row in ARCHITECTURES.values()
        if row.gguf_name == file.architecture and (row.experts is not None) == has_experts
    )  # fmt: skip
    return next(fitting, None)


__all__ = ["ARCHITECTURES", "Architecture", "ModelConfig", "Rope", "family_of_gguf"]
