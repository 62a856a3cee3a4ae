"""What is chosen on which machine, and why; and that torch's settings are put back."""

from __future__ import annotations

import pytest
import torch

from edgelora import device
from edgelora.device import (
    Choice,
    card_of,
    choose_device,
    choose_dtype,
    choose_products,
    compute_threads,
    computing,
    free_memory_bytes,
    peak_memory_bytes,
    physical_cores,
)
from edgelora.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda=…, bf16=…, mps=…, flags=…, vendor=…)`: as if this one had that, and two cards if any."""

    def is_one(cuda=False, bf16=True, mps=False, flags="", vendor="GenuineIntel"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device, "_cpuinfo", {"flags": flags, "vendor_id": vendor}.get)

    return is_one


@pytest.mark.parametrize(
    ("has", "expected"),
    [({}, "cpu"), ({"cuda": True}, "cuda"), ({"cuda": True, "mps": True}, "cuda"), ({"mps": True}, "cpu")],
)
def test_the_device_that_is_chosen(machine, has, expected):
    machine(**has)
    choice = choose_device()
    assert choice.value == expected
    assert ("--device mps tries it" in choice.why) == (has == {"mps": True})


@pytest.mark.parametrize("asked", ["cpu", "cuda", "cuda:0", "cuda:1", "mps"])
def test_a_device_that_is_there_can_be_asked_for(machine, asked):
    machine(cuda=True, mps=True)
    assert choose_device(asked) == Choice(asked, "asked for")


@pytest.mark.parametrize("asked", ["cuda", "mps", "tpu", ""])
def test_a_device_that_is_not_there_is_refused(machine, asked):
    machine()
    with pytest.raises(ConfigError) as fault:
        choose_device(asked)
    assert str(fault.value).splitlines() == [
        f"--device {asked}: there is none that torch can use",
        f"  why: torch {torch.__version__} sees cpu",
        "  fix: leave --device out, or install the build of torch for it (make quickstart TORCH=default)",
    ]


@pytest.mark.parametrize("number", ["2", "-1", "foo", "", "01", "+1", "1 ", "1:1", "\N{SUPERSCRIPT ONE}"])
def test_a_card_that_is_not_there_is_refused(machine, number):
    machine(cuda=True)
    with pytest.raises(ConfigError) as fault:
        choose_device(f"cuda:{number}")
    assert str(fault.value).splitlines() == [
        f"--device cuda:{number}: there is no such card",
        "  why: torch sees cuda:0, cuda:1",
        "  fix: pass one of these, or --device cuda",
    ]


@pytest.mark.parametrize("asked", ["cpu:0", "cpu:foo", "cpu:", "mps:0"])
def test_what_is_not_counted_is_asked_for_without_a_number(machine, asked):
    """`cpu:0` would be the CPU to torch, and another device to all that is chosen for `cpu`."""
    machine(mps=True)
    with pytest.raises(ConfigError) as fault:
        choose_device(asked)
    kind = asked[:3]
    assert fault.value.what == f"--device {asked}: there is one {kind}, and it has no number"
    assert fault.value.fix == f"pass --device {kind}"


def test_a_card_without_a_number_is_the_one_that_is_computed_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [card_of(asked) for asked in ("cuda", "cuda:0", "cuda:12")] == [3, 0, 12]


@pytest.mark.parametrize(
    ("where", "has", "expected"),
    [
        ("cpu", {"flags": "avx2 avx512f"}, "f32"),
        ("cpu", {"flags": "avx2 avx512_bf16"}, "bf16"),
        ("cpu", {"flags": "amx_bf16 amx_tile"}, "bf16"),
        ("cuda", {"cuda": True}, "bf16"),
        ("cuda:1", {"cuda": True, "bf16": False}, "f32"),  # older than Ampere: it would be emulated
        ("mps", {"flags": "avx512_bf16"}, "f32"),  # the CPU's flags say nothing of it
    ],
)
def test_bfloat16_is_chosen_where_the_hardware_multiplies_it_faster(machine, where, has, expected):
    machine(**has)
    assert choose_dtype("auto", where).value == expected


@pytest.mark.parametrize("asked", ["f32", "bf16"])
def test_a_number_format_can_be_asked_for(machine, asked):
    machine()
    assert choose_dtype(asked) == Choice(asked, "asked for")


def test_only_a_cpu_of_amds_takes_other_products(machine):
    machine(vendor="AuthenticAMD")
    assert [choose_products(where).value for where in ("cpu", "cuda", "mps")] == ["medium", "highest", "highest"]
    machine()
    assert choose_products("cpu").value == "highest"


def test_products_on_this_machine_are_full_float32():
    """`medium` may round to bfloat16 where a CPU has AMX: it must not be chosen there (7 bits, an error of 4e-3)."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 512, generator=draw) for _ in range(2))
    exact = a.double() @ b.double().T
    with computing(choose_products(), torch.get_num_threads()):
        found = a @ b.T
    assert float((found - exact).norm() / exact.norm()) < 2e-6


def test_torchs_settings_are_put_back_whatever_happens():
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()

    def work():
        with computing(Choice("medium", ""), before[1] + 1):
            assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == ("medium", before[1] + 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == before


def test_threads_are_cores_unless_somebody_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert compute_threads() == physical_cores() >= 1
    for asked, threads in (("3", 3), ("0", 1), ("many", physical_cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert compute_threads() == threads


def test_memory_is_measured_in_bytes():
    before = peak_memory_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])  # every page is touched
    assert peak_memory_bytes() >= max(before, 64 << 20)
    free = free_memory_bytes()
    assert free is None or 1 << 20 < free < 1 << 50
