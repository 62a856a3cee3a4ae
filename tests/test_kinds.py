"""Every kind of adapter in the table: what is wrong with one is told at once, and one without its tensors is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgelora.base.model import open_base
from edgelora.errors import AdapterError
from edgelora.peft.adapter import CONFIG, TENSORS, Adapter, read_adapter, write_adapter
from edgelora.peft.kind import PREFIX, shape_of
from edgelora.peft.kinds import KINDS, NATIVE, NATIVE_TYPE, kind_of

OF_LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0}
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"peft_type": name} for name in KINDS},
    "LORA": OF_LORA,
    "DoRA": {**OF_LORA, "use_dora": True},
    "LORA and more": {**OF_LORA, "bias": "all"},
    "ADALORA": {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8.0},
    "TRAINABLE_TOKENS": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5]},
    **{name: {"peft_type": NATIVE_TYPE, "method": name} for name in NATIVE},
}
OF_LINEARS = [name for name, one in SETTINGS.items() if name != "VERA" and kind_of(one).parts]  # type: ignore[union-attr]
HALF, TURNED, NAN, SOUND = (
    f"model.layers.{i}.mlp.{name}_proj" for i, name in ((0, "up"), (0, "down"), (1, "down"), (1, "up"))
)


@pytest.fixture(scope="module")
def layers(tiny):
    return open_base(tiny.path).layers


def parts_of(words: Mapping[str, str], d_out: int, d_in: int) -> dict[str, np.ndarray]:
    """Ones, in the first shape that each of the parts may have."""
    sizes = {"out": d_out, "in": d_in, "r": 4, "e": 3}
    return {part: np.ones(shape_of(one.split("|")[0], sizes), np.float32) for part, one in words.items()}


@pytest.mark.parametrize("name", OF_LINEARS)
def test_all_that_is_wrong_with_one_is_told_at_once(layers, tmp_path, name):
    """A part missing, one of another shape, one that is no number, and tensors of another method and another model."""
    kind = kind_of(SETTINGS[name])
    tensors = {module: parts_of(kind.parts, *layers.linears[module]) for module in (HALF, TURNED, NAN, SOUND)}
    write_adapter(tmp_path / "sound", Adapter(SETTINGS[name], tensors))
    assert set(read_adapter(tmp_path / "sound", layers).tensors) == set(tensors)

    first, *others = kind.parts
    missing = [f"{HALF}: {first} is missing"] if others else []
    if others:
        del tensors[HALF][first]
    right = tensors[TURNED][first]
    tensors[TURNED][first] = wrong = right.T if right.ndim > 1 else right[:-1]
    tensors[NAN][first].flat[0] = np.nan
    tensors["model.layers.7.mlp.up_proj"] = tensors[SOUND]
    write_adapter(tmp_path / "mine", Adapter(SETTINGS[name], tensors))
    flat = {kind.name(module, part, parts): x for module, parts in tensors.items() for part, x in parts.items()}
    flat = {one: np.ascontiguousarray(x) for one, x in flat.items()} | {f"{PREFIX}{SOUND}.oft_R": right}
    save_file(flat, tmp_path / "mine" / TENSORS)
    with pytest.raises(AdapterError) as refused:
        read_adapter(tmp_path / "mine", layers)
    told = refused.value.what.removeprefix(f"{tmp_path / 'mine'}: ").split("; ")
    assert sorted(one for one in told if not one.startswith(f"{TURNED}: ")) == sorted([
        f"{PREFIX}{SOUND}.oft_R is no part of {kind.one}", *missing, f"{NAN}: it holds NaN or infinite values",
        "model.layers.7.mlp.up_proj is no linear layer of this model",
    ])  # fmt: skip
    assert any(one.startswith(f"{TURNED}: {first} is {wrong.shape}, expected ") for one in told)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_without_its_tensors_is_none(layers, tmp_path, name):
    write_adapter(tmp_path / "mine", Adapter(OF_LORA, {SOUND: parts_of(KINDS["LORA"].parts, *layers.linears[SOUND])}))
    (tmp_path / "mine" / CONFIG).write_text(json.dumps(SETTINGS[name]), encoding="utf-8")
    save_file({}, tmp_path / "mine" / TENSORS)
    with pytest.raises(AdapterError, match=r"it holds no .* tensors|vera_A and vera_B are not two matrices"):
        read_adapter(tmp_path / "mine", layers)
