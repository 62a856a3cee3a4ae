"""Base → decoder in torch. Stored weights stay as they are stored, in HF's row order, unless another way is asked."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from edgelora.architectures.names import EMBEDDING, HEAD, tensor_shapes
from edgelora.base.hold import hold
from edgelora.base.host_rows import HostRows
from edgelora.base.model import Base
from edgelora.base.weights import from_rows
from edgelora.nn.decoder import Decoder
from edgelora.nn.frozen import Frozen
from edgelora.nn.linear import Weight

# `--dtype` → what matrix products are computed in
COMPUTE = {"f32": torch.float32, "bf16": torch.bfloat16}


def build_decoder(
    base: Base, base_dtype: str = "blocks", compute: torch.dtype = torch.float32, device: str = "cpu"
) -> Decoder:
    """A decoder over the weights of `base`, held as `base_dtype` (see `base/hold.py`), tensor by tensor on `device`.

    Its matrix products are computed in `compute`. With `blocks`, only rotary projections of a GGUF are copied (their
    rows move), the rest is mapped.
    """
    ends = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
    names = [name for name in tensor_shapes(base.architecture, base.config, base.biased) if name not in ends]
    matrices, vectors = held(base, names, base_dtype, device)
    # the vocabulary's rows are looked up or multiplied a slice at a time, from where they are stored
    stored = from_rows(*base.tensors.matrix(f"{EMBEDDING}.weight"))
    embedding: Weight = stored.to(device)
    head = embedding
    if not base.config.tie_word_embeddings:
        embedding = HostRows(stored) if device.startswith("cuda") else embedding
        head = hold(base.tensors.matrix(f"{HEAD}.weight"), "blocks").to(device)
    return Decoder(base.architecture, base.config, Frozen(matrices, vectors, embedding, head, compute))


def held(
    base: Base, names: Iterable[str], base_dtype: str = "blocks", device: str = "cpu"
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """The matrices by their modules, and the vectors by their names, of these tensors of `base`."""
    shapes, experts = tensor_shapes(base.architecture, base.config, base.biased), base.architecture.experts
    router = f".{experts.router}.weight" if experts else None  # a few numbers that decide all: floats, as in every GGUF
    matrices, vectors = {}, {}
    for name in names:
        if len(shapes[name]) == 1:
            vectors[name] = torch.from_numpy(base.tensors.vector(name).copy()).to(device)
        else:
            how = "f32" if router is not None and name.endswith(router) else base_dtype
            matrices[name.removesuffix(".weight")] = hold(base.tensors.matrix(name), how).to(device)
    return matrices, vectors
