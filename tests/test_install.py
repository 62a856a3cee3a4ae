"""What `make` sets up: the right torch, our flags, and nothing at all the second time."""

from __future__ import annotations

import argparse
import importlib.util
import shlex

import pytest
from conftest import ROOT


@pytest.fixture
def install(tmp_path, monkeypatch):
    """The script as a module, with its virtual environment in a folder of the test's."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "PYTHON", tmp_path / "python")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return module


@pytest.fixture
def calls(install, monkeypatch):
    """Every pip call that would be made, as (arguments, environment)."""
    made = []

    def pip(*arguments, environment=None, **_):
        made.append((arguments, environment))
        return True

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "make_venv", lambda: None)
    monkeypatch.setattr(install, "compiled", lambda: False)
    return made


def run(install, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["install.py", *arguments])
    install.main()


def test_the_second_run_installs_nothing(install, calls, monkeypatch, capsys):
    monkeypatch.setattr(install, "version_of", lambda _: "")
    install.PYTHON.touch()
    run(install, monkeypatch, "quickstart")
    assert len(calls) >= 5
    assert "C code could not be compiled" in capsys.readouterr().err
    calls.clear()
    run(install, monkeypatch, "quickstart")
    assert calls == []
    assert "everything for `make quickstart` is installed" in capsys.readouterr().err
    run(install, monkeypatch, "test")  # the tests need more
    assert any(a[-1].endswith("[test]") for a, _ in calls)


@pytest.mark.parametrize("change", ["torch", "flags", "processor"])
def test_another_option_is_not_taken_for_installed(install, monkeypatch, change):
    before = install.stamp(argparse.Namespace(goal="test", torch="auto"))
    if change == "flags":
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    if change == "processor":
        monkeypatch.setattr(install, "processor", lambda: "another")
    assert install.stamp(argparse.Namespace(goal="test", torch="cpu" if change == "torch" else "auto")) != before


@pytest.mark.parametrize(
    ("asked", "system", "driver", "cpu"),
    [
        ("auto", "Linux", None, True),
        ("auto", "Linux", "/usr/bin/nvidia-smi", False),
        ("auto", "Darwin", None, False),
        ("cpu", "Linux", "/usr/bin/nvidia-smi", True),
        ("default", "Linux", None, False),
    ],
)
def test_nobody_downloads_cuda_for_nothing(install, monkeypatch, asked, system, driver, cpu):
    monkeypatch.setattr(install.platform, "system", lambda: system)
    monkeypatch.setattr(install.shutil, "which", lambda _: driver)
    assert install.wants_cpu_torch(asked)[0] is cpu


@pytest.mark.parametrize(
    ("asked", "found", "installs"),
    [("auto", "2.13.0", False), ("auto", "", True), ("cpu", "2.13.0", True), ("cpu", "2.13.0+cpu", False),
     ("default", "2.13.0+cpu", True), ("default", "2.13.0", False)],
)  # fmt: skip
def test_asking_for_the_other_torch_installs_it(install, calls, monkeypatch, asked, found, installs):
    monkeypatch.setattr(install, "version_of", lambda _: found)
    install.install_torch(asked)
    assert bool(calls) is installs


def test_llama_is_built_with_our_flags_and_the_users(install, calls, monkeypatch):
    monkeypatch.setattr(install, "version_of", lambda _: "")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    install.install_llama()
    arguments, environment = calls[0]
    flags = shlex.split(environment["CMAKE_ARGS"])
    assert flags[:2] == ["-DLLAVA_BUILD=OFF", "-DLLAMA_OPENSSL=OFF"]
    assert flags[-1] == "-DGGML_CUDA=ON"
    assert flags[2].endswith("only-llama.cmake")  # whole, though the folder may have a blank in its name
    assert "--no-cache-dir" in arguments


def test_every_pin_is_exact(install):
    lines = [x for x in install.CONSTRAINTS.read_text().splitlines() if x and not x.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert {"torch==2.13.0", "llama-cpp-python==0.3.36"} <= set(lines)
    with pytest.raises(SystemExit, match="is not in constraints"):
        install.pin("nothing")
