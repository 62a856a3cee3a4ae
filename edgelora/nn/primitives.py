"""How many shapes of products oneDNN remembers. It keeps some 0.5 MB of code and scratch memory for each of them.

Packed rows come in hundreds of lengths, and each brings twenty shapes that are hardly seen again: torch's bounds of
1024 let half a gigabyte pile up in the first fifty micro-batches, in places that split what activations could reuse.
"""

from __future__ import annotations

import os

CAPACITY = 32  # the shapes of a micro-batch or two, no slower than 64; with 16 a step of a 135M model took 8 % longer
BOUNDS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # of torch's cache over oneDNN's, and of oneDNN's


def bound_primitives() -> None:
    """Hold both caches to CAPACITY, unless the environment says otherwise. Too late after the first product."""
    for name in BOUNDS:
        os.environ.setdefault(name, str(CAPACITY))
