"""Where the user's files live, and which bases are known by what is in them."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import platformdirs
import pytest
from conftest import ROOT

from edgelora import catalog as subject
from edgelora import home
from edgelora.base.model import open_base
from edgelora.catalog import Known, catalog, read_catalog, recognize
from edgelora.errors import ConfigError
from edgelora.files.contract import sha256_file
from edgelora.pipeline.doctor import examine
from edgelora.pipeline.inspect import inspect
from edgelora.pipeline.quickstart import MODEL, MODEL_SHA256

ENTRY = """["a.gguf"]
source = "here"
original = "there"
licence = "MIT"
architecture = "llama"
size_bytes = 5
sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
"""  # the sha256 of "hello"


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path))
    return tmp_path


def test_the_environment_decides_first(own_home):
    assert home.models_folder() == own_home
    assert home.cache_folder() == own_home / "cache"


def test_a_tilde_is_the_users_folder(monkeypatch):
    monkeypatch.setenv("EDGELORA_HOME", "~/elsewhere")
    assert home.models_folder() == Path.home() / "elsewhere"


def test_then_the_checkout_then_the_platform(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGELORA_HOME", raising=False)
    assert home.models_folder() == ROOT / "models"
    monkeypatch.setattr(home, "CHECKOUT", tmp_path)  # as where it is an installed package
    assert home.models_folder() == platformdirs.user_data_path("edgelora", appauthor=False)
    assert home.models_folder().name == "edgelora"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG's folders are Linux's")
def test_on_linux_that_is_the_folder_of_xdg(tmp_path):
    code = "import sys; from edgelora import home; home.CHECKOUT = home.Path('/'); print(home.models_folder())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"XDG_DATA_HOME": str(tmp_path), "HOME": "/root"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "edgelora")


def test_every_entry_of_the_catalog_is_whole():
    entries = read_catalog(ROOT / "models" / "catalog.toml")
    assert {entry.name: entry.architecture for entry in entries} == {
        MODEL: "llama",
        "gemma-3-270m-q4_k_m.gguf": "gemma3",
    }
    assert len({entry.sha256 for entry in entries}) == len(entries)
    assert MODEL_SHA256 in catalog()


@pytest.mark.real
def test_the_catalog_knows_the_real_smollm(smollm):
    known = recognize(smollm)
    assert (known.name, known.architecture) == (MODEL, open_base(smollm).architecture.gguf_name)


@pytest.mark.real
def test_the_catalog_knows_the_real_gemma_by_any_name(gemma, tmp_path):
    (tmp_path / "mine.gguf").hardlink_to(gemma)
    known = recognize(tmp_path / "mine.gguf")
    assert (known.name, known.sha256) == ("gemma-3-270m-q4_k_m.gguf", sha256_file(gemma))
    assert (known.architecture, "Gemma" in known.licence) == (open_base(gemma).architecture.gguf_name, True)


def test_a_file_is_known_by_what_is_in_it(own_home):
    (own_home / "catalog.toml").write_text(ENTRY)
    for name, content in (("x.gguf", b"hello"), ("a.gguf", b"jello"), ("b.gguf", b"hello!")):
        (own_home / name).write_bytes(content)
    assert recognize(own_home / "x.gguf") == read_catalog(own_home / "catalog.toml")[0]
    assert recognize(own_home / "a.gguf") is recognize(own_home / "b.gguf") is recognize(own_home / "none") is None


def test_only_a_file_of_a_known_size_is_read(own_home, monkeypatch):
    monkeypatch.setattr(subject.hashlib, "file_digest", None)
    (own_home / "large.gguf").write_bytes(b"hello!")
    assert recognize(own_home / "large.gguf") is None


def test_the_users_catalog_adds_to_the_checkouts(own_home):
    (own_home / "catalog.toml").write_text(ENTRY)
    names = {known.name for known in catalog().values()}
    assert names == {"a.gguf", MODEL, "gemma-3-270m-q4_k_m.gguf"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("size_bytes = 5\n", ""), "a.gguf must have source"),
        (("size_bytes = 5", 'size_bytes = "5"'), "size_bytes is a number"),
        (("sha256 = ", "more = 1\nsha256 = "), "and nothing else"),
        (("2cf24", "2CF24"), "64 hexadecimal digits"),
        (("2cf24", "2cf2"), "64 hexadecimal digits"),
        (("source =", "source"), "Expected '='"),
        (('["a.gguf"]', "x = 1\n[y]"), "x must have"),
    ],
)
def test_a_wrong_catalog_is_told(own_home, change, why):
    (own_home / "catalog.toml").write_text(ENTRY.replace(*change))
    with pytest.raises(ConfigError) as fault:
        catalog()
    assert why in fault.value.why


def test_inspect_and_doctor_name_a_known_base(own_home, tiny):
    path = own_home / "renamed.gguf"
    shutil.copyfile(tiny.path, path)
    assert inspect(path).origin.known is None
    entry = tomllib.loads(ENTRY)["a.gguf"] | {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    lines = [f"{key} = {value!r}" for key, value in entry.items()]
    (own_home / "catalog.toml").write_text("\n".join(['["a.gguf"]', *lines]))
    known = inspect(path).origin.known
    assert dataclasses.asdict(known) == {"name": "a.gguf", **entry}
    assert isinstance(known, Known)
    assert examine()["known_bases"] == "a.gguf (MIT)"
    (own_home / "catalog.toml").write_text("x = 1")
    assert "not a catalog" in inspect(path).origin.faults[0]
    assert examine()["known_bases"].startswith("unknown: ")
