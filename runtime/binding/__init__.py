"""Models, contexts, adapters: all of this house that touches llama_cpp's ctypes. Every C answer is checked.

Each handle has one owner and one way to die (`close`); a closed handle raises EngineError. Nothing here knows prompts,
adapters' names or what may be reused: that is `engine.py`.
"""

from runtime.binding.context import UBATCH_TOKENS, Context, Entry, KeyValues
from runtime.binding.handle import C
from runtime.binding.model import Lora, Model, Placement
from runtime.binding.samplers import Candidates, GrammarSampler, SamplerChain
from runtime.binding.watch import Product, Watch

__all__ = [
    "UBATCH_TOKENS", "Candidates", "Context", "Entry", "GrammarSampler", "KeyValues", "Lora", "Model",
    "Placement", "Product", "SamplerChain", "Watch", "build", "system_info",
]  # fmt: skip


def build() -> str:
    """Which llama.cpp this is: two that say the same compute the same."""
    return f"llama-cpp-python {C.__version__}, {system_info()}"


def system_info() -> str:
    """What llama.cpp was built with: AVX2, AVX512, Metal, CUDA …"""
    return str(C.llama_print_system_info().decode())
