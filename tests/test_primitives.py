"""oneDNN forgets the shapes of products that will hardly come again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from edgelora.nn.primitives import BOUNDS, CAPACITY, bound_primitives

GROWTH = """
import ctypes
{first}
import torch

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
torch.set_num_threads(1)
weights = [torch.zeros(rows, columns, dtype=torch.bfloat16) for rows, columns in ((576, 576), (1536, 576), (576, 1536))]
for length in range(400, 440):
    for w in weights:
        x = torch.zeros(length, w.shape[1], dtype=w.dtype)
        y = x @ w.T
        y @ w
    del x, y
    heap = libc.mallinfo2()
    first = heap.uordblks + heap.hblkhd if length == 402 else first if length > 402 else 0
print(heap.uordblks + heap.hblkhd - first)
"""


def growth(first):
    """Bytes that the heap grows by over 37 lengths of packed rows."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(first=first)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc tells how much of its heap is in use")
def test_products_of_ever_new_shapes_do_not_pile_up():
    free = growth("")
    if free < 40 << 20:
        pytest.skip("no bfloat16 products through oneDNN on this CPU")
    assert growth("from edgelora.nn.primitives import bound_primitives; bound_primitives()") < free / 2


def test_what_the_environment_says_is_left(monkeypatch):
    for name in BOUNDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(BOUNDS[0], "7")
    bound_primitives()
    assert [os.environ[name] for name in BOUNDS] == ["7", str(CAPACITY)]
