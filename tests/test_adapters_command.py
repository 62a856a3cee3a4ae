"""`edgelora adapters`, as it is typed."""

from __future__ import annotations

import json

import pytest
from test_export import make_adapter
from test_preflight import pair, write_foreign

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.cli import run
from runtime.names import stored_name_of
from runtime.store import Store


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def exported(at_home, tiny):
    base = open_base(tiny.path)
    write_adapter_gguf(at_home / "My Poet.gguf", make_adapter(base), base, "poet")
    return at_home / "My Poet.gguf"


def typed(capsys, *words):
    """(exit code, stdout, stderr) of `edgelora adapters WORDS…`."""
    code = run(["adapters", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_adapter_is_added_shown_listed_and_removed(capsys, exported, tiny):
    code, out, _ = typed(capsys, "add", exported)
    assert (code, out.splitlines()[0].split()[:2]) == (0, ["name", "my-poet,"])
    assert typed(capsys, "show", "my-poet") == (0, out, "")
    assert f"F32), identity {open_base(tiny.path).fingerprint.short}" in out
    code, out, _ = typed(capsys, "list")
    heads, *_, row = out.strip().splitlines()
    assert code == 0
    assert heads.split() == ["name", "size", "rank", "method", "trained", "over", "added"]
    assert row.split()[0] == "my-poet"
    assert typed(capsys, "remove", "my-poet") == (0, "my-poet is no longer stored\n", "")
    assert typed(capsys, "list") == (0, "none yet; add one: edgelora adapters add FILE.gguf\n", "")


def test_json_says_all_that_is_known(capsys, exported, at_home):
    _, out, _ = typed(capsys, "add", exported, "--name", "poet", "--json")
    added = json.loads(out)
    stored = Store(at_home / "home" / "adapters").get("poet")
    assert added == json.loads(json.dumps(stored.as_dict()))
    assert added["path"].endswith(f"{added['digest']}.gguf")
    assert json.loads(typed(capsys, "show", "poet", "--json")[1]) == added
    assert json.loads(typed(capsys, "list", "--json")[1]) == [added]
    assert json.loads(typed(capsys, "remove", "poet", "--json")[1]) == {"removed": "poet"}
    assert json.loads(typed(capsys, "list", "--json")[1]) == []


def test_errors_are_three_lines_and_a_code(capsys, exported, at_home):
    assert typed(capsys, "show", "poet") == (
        1,
        "",
        "error: no adapter is stored as 'poet'\n  why: stored are: none yet\n"
        "  fix: add it first: edgelora adapters add FILE --name NAME\n",
    )
    typed(capsys, "add", exported, "--name", "poet")
    other = write_foreign(at_home / "other.gguf", pair())
    code, _, err = typed(capsys, "add", other, "--name", "poet")
    assert (code, err.splitlines()[0]) == (1, "error: the name poet is taken")
    assert typed(capsys, "add", other, "--name", "poet", "--overwrite")[0] == 0
    assert "not named: made elsewhere" in typed(capsys, "show", "poet")[1]
    code, _, err = typed(capsys, "add", at_home, "--name", "folder")
    assert (code, "edgelora export BASE" in err) == (1, True)


def test_what_a_stranger_wrote_does_not_reach_the_terminal(capsys, at_home, tiny):
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    said = adapter.contract.model_copy(update={"system": "\x1b[31mred\n", "method": "[bold]x"})
    write_adapter_gguf(at_home / "a.gguf", type(adapter)(adapter.config, adapter.tensors, said), base, "a")
    _, out, _ = typed(capsys, "add", at_home / "a.gguf")
    assert "\x1b" not in out
    assert "\\x1b[31mred\\n" in out
    assert "[bold]x" in typed(capsys, "list")[1]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Home.gguf", "home"),
        ("My Poet (2).gguf", "my-poet-2-"),
        ("--x.gguf", "x"),
        ("é.gguf", ""),
        ("a" * 80, "a" * 64),
    ],
)
def test_the_name_is_made_of_the_files(file, name, tmp_path):
    assert stored_name_of(tmp_path / file) == name
