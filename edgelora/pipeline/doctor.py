"""What hardware and versions are here, and what edgelora would choose on them."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

from edgelora.catalog import recognize
from edgelora.child import run_in_child
from edgelora.device import choose_device, choose_dtype, free_memory_bytes, physical_cores, processor_name
from edgelora.errors import EdgeloraError
from edgelora.home import models_folder
from edgelora.kernels import load
from edgelora.progress import OnProgress
from edgelora.versions import versions

NO_KERNELS = "none, torch does all the work: not compiled when edgelora was installed, or not for this machine"
FEATURES = ("AVX2", "AVX512", "AVX512_BF16", "AMX_INT8", "NEON", "OPENMP", "REPACK")
GPUS = {"MTL": "Metal", "CUDA": "CUDA", "Vulkan": "Vulkan"}  # a part of llama.cpp → what people call it


def examine() -> dict[str, Any]:
    """Name → finding. A part that is missing or broken is reported, never raised."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": physical_cores(),
        "free_memory_bytes": free_memory_bytes(),
    }
    facts |= versions()
    for name, choose in (("device", choose_device), ("dtype", choose_dtype)):
        try:
            choice = choose()
            facts[name] = asdict(choice)
        except ImportError as e:
            facts[name] = {"value": "none", "why": f"torch cannot be imported ({e}); run `make quickstart`"}
    facts["kernels"] = "compiled for this machine" if load.library() else NO_KERNELS
    try:
        facts["llama_cpp"] = run_in_child(_llama_features)
    except EdgeloraError as e:
        facts["llama_cpp"] = f"cannot be loaded: {e.why}"
    facts["models_folder"] = str(models_folder())
    facts["known_bases"] = _known_bases()
    return facts


def _known_bases() -> str:
    try:
        found = [known for path in sorted(models_folder().glob("*.gguf")) if (known := recognize(path)) is not None]
    except EdgeloraError as e:
        return f"unknown: {e.what}: {e.why}"
    return "; ".join(f"{known.name} ({known.licence})" for known in found) or "none of the catalog's"


def _llama_features(_: OnProgress) -> str:
    from runtime.binding import system_info

    return _features(system_info())


def _features(info: str) -> str:
    """`CPU : AVX2 = 1 | … | MTL : EMBED_LIBRARY = 1 | …` in a few words."""
    words = info.split()
    found = [name for name in FEATURES if f"{name} = 1" in info] + [GPUS[word] for word in words if word in GPUS]
    return f"built with {', '.join(found) or 'no special instructions'}"
