"""What hardware and versions are here, and what edgelora would choose on them."""

from __future__ import annotations

import platform

from edgelora.child import run_in_child
from edgelora.device import choose_device, choose_dtype, free_memory_bytes, physical_cores, processor_name
from edgelora.errors import EdgeloraError
from edgelora.home import models_folder
from edgelora.progress import OnProgress
from edgelora.versions import versions

FEATURES = ("AVX2", "AVX512", "AVX512_BF16", "AMX_INT8", "NEON", "METAL", "CUDA", "OPENMP", "REPACK")


def examine() -> dict[str, str]:
    """Name → finding. A part that is missing or broken is reported, never raised."""
    free = free_memory_bytes()
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{processor_name()}, {physical_cores()} cores",
        "free memory": "unknown" if free is None else f"{free / 1e9:.1f} GB",
    }
    facts |= versions()
    for name, choose in (("device", choose_device), ("dtype", choose_dtype)):
        try:
            choice = choose()
            facts[name] = f"{choice.value}: {choice.why}"
        except ImportError as e:
            facts[name] = f"torch cannot be imported ({e}); run `make quickstart`"
    try:
        facts["llama.cpp"] = run_in_child(_llama_features)
    except EdgeloraError as e:
        facts["llama.cpp"] = f"cannot be loaded: {e.why}"
    facts["models folder"] = str(models_folder())
    return facts


def _llama_features(_: OnProgress) -> str:
    from runtime.binding import system_info

    info = system_info()
    found = [name for name in FEATURES if f"{name} = 1" in info]
    return f"built with {', '.join(found) or 'no special instructions'}"
