"""A process is held to a part of a GPU's memory; the card is imagined where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from edgelora.base.device_memory import hold_to, parse_size
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError

SIZES = {"8GB": 8_000_000_000, "8 GiB": 8 << 30, "7.5GB": 7_500_000_000, "800MB": 800_000_000, " 1MiB ": 1 << 20}


@pytest.fixture
def card(monkeypatch):
    """An imagined card of 12.88 GB, and the calls that hold a process to a part of it."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: SimpleNamespace(name="Imagined 3060", total_memory=12_884_901_888),
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *a: calls.append(a))
    return calls


@pytest.mark.parametrize("text", SIZES)
def test_an_amount_is_a_number_and_a_unit(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["8GB", "8 GiB", "7.5GB", "800MB"])
def test_the_setting_takes_what_is_understood_here(text, tmp_path):
    config = TrainConfig(base=tmp_path, data=tmp_path, out=tmp_path, max_gpu_memory=text)
    assert parse_size(config.max_gpu_memory) == SIZES[text]


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda", 2)])
def test_a_process_is_held_to_its_share_of_the_card_it_computes_on(card, device, index):
    choice = hold_to("8GB", device)
    assert card == [(8e9 / 12_884_901_888, index)]
    assert (choice.value, choice.why) == ("8 GB", "asked for; Imagined 3060 has 12.88 GB")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU whose allocator could refuse")
def test_more_than_the_share_is_refused():
    hold_to("512MB")
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(600_000_000, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("text", ["8", "8TB", "eight GB", "-8GB", "0GB", "8gb", "", "1e3GB"])
def test_what_is_no_amount_is_refused(text, card):
    with pytest.raises(ConfigError) as e:
        hold_to(text)
    assert e.value.what == f"{text}: no amount of memory"
    assert "GB, GiB, MB, MiB" in e.value.why
    assert "8GB" in e.value.fix
    assert card == []


def test_a_smaller_card_is_refused(card):
    with pytest.raises(ConfigError) as e:
        hold_to("16GB")
    assert e.value.what == "--max-gpu-memory 16GB: Imagined 3060 has 12.88 GB"
    assert "12.88GB" in e.value.fix
    assert card == []
    hold_to("12.88GB")
    assert len(card) == 1


def test_without_an_nvidia_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as e:
        hold_to("8GB")
    assert e.value.what == "--max-gpu-memory 8GB: there is no NVIDIA GPU here that torch can use"
    assert "CUDA" in e.value.why
    assert "leave" in e.value.fix
