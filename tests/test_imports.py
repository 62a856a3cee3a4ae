"""DESIGN's rules about imports: one direction, three doors to llama.cpp, and no torch where none is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSES = ("edgelora", "converters", "runtime")

# THE TABLE, from the roof down: what each room may import. Every entry names rooms further down.
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {
        "pipeline", "runtime", "training", "base", "evaluate", "invocation", "config", "faults", "progress", "words",
        "errors",
    },
    "pipeline": {
        "converters", "runtime", "training", "peft", "base", "nn", "evaluate", "data", "files",
        "child", "catalog", "home", "invocation", "device", "kernels", "versions", "config", "progress", "words",
        "errors",
    },
    "converters": {"peft", "base", "architectures", "data", "files", "child", "progress", "words", "errors"},
    "runtime": {"base", "evaluate", "data", "files", "home", "device", "progress", "errors"},
    "edgelora": {"training", "config"},  # the package itself: `edgelora.train` and `edgelora.TrainConfig`, on demand
    "training": {
        "peft", "base", "nn", "architectures", "data", "files", "invocation", "device", "kernels", "versions",
        "config", "faults", "progress", "words", "errors",
    },
    "peft": {"nn", "architectures", "files", "errors"},
    "base": {"nn", "architectures", "data", "files", "device", "team", "kernels", "errors"},
    "nn": {"architectures", "team", "kernels", "errors"},
    "architectures": {"files", "errors"},
    "evaluate": {"data", "progress", "words", "errors"},
    "data": {"files", "words", "errors"},
    "files": {"words", "errors"},
    "child": {"progress", "errors"},
    "catalog": {"home", "errors"},
    "home": {"errors"},
    "invocation": set(),
    "device": {"errors"},
    "kernels": {"team"},
    "team": set(),
    "versions": set(),
    "config": {"faults", "errors"},
    "faults": set(),
    "progress": set(),
    "words": set(),
    "errors": set(),
}  # fmt: skip
HEIGHT = {room: -i for i, room in enumerate(MAY_IMPORT)}


def sources() -> list[Path]:
    return sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))


def room_of(module: str) -> str:
    """`edgelora.data.encode` → data; `converters.merge` → converters."""
    house, _, rest = module.partition(".")
    return rest.partition(".")[0] or house if house == "edgelora" else house


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only: path = import name"
            assert node.module is not None
            # `from edgelora import x` may name a room, or something of the package itself
            rooms = [f"edgelora.{a.name}" for a in node.names if node.module == "edgelora" and a.name in MAY_IMPORT]
            yield from rooms or [node.module]


def edges() -> Iterator[tuple[Path, str, str]]:
    """(file, its room, a room of ours that it imports)."""
    for path in sources():
        room = room_of(module_of(path))
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name.partition(".")[0] in HOUSES and room_of(name) != room:
                yield path, room, room_of(name)


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that does not look into the current folder."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )


def test_the_table_names_every_room():
    assert {room_of(module_of(path)) for path in sources()} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_table_points_one_way(room):
    assert all(HEIGHT[other] < HEIGHT[room] for other in MAY_IMPORT[room])


def test_imports_keep_to_the_table():
    strangers = [f"{path.relative_to(ROOT)} imports {other}" for path, room, other in edges()
                 if other not in MAY_IMPORT[room]]  # fmt: skip
    assert strangers == []


def test_converters_and_runtime_do_not_know_each_other():
    assert not {(room, other) for _, room, other in edges()} & {("converters", "runtime"), ("runtime", "converters")}


def test_only_the_roof_imports_converters_and_runtime():
    assert {room for _, room, other in edges() if other in ("converters", "runtime")} <= {"cli", "pipeline"}


def test_nobody_imports_the_roof():
    assert {(room, other) for _, room, other in edges() if other in ("cli", "pipeline")} == {
        ("__main__", "cli"), ("cli", "pipeline"),
    }  # fmt: skip


def test_llama_cpp_has_two_python_doors():
    def opens(tree: ast.AST) -> bool:
        return any(name.partition(".")[0] == "llama_cpp" for name in imports(tree))

    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    doors = {path for path, tree in trees.items() if opens(tree)}
    assert doors == {"runtime/binding/handle.py", "converters/quantize.py"}
    inside = {path for path, tree in trees.items() if "runtime.binding.handle" in imports(tree)}
    assert all(path.startswith("runtime/binding/") for path in inside)  # who holds that has llama_cpp too
    # the second opens in a child only: importing the module must not load llama.cpp into the caller
    parts = [node for node in trees["converters/quantize.py"].body if opens(node)]
    assert [part for part in parts if not isinstance(part, ast.FunctionDef)] == []


def test_no_benchmark_stands_in_the_way_of_a_house():
    """A script's own folder is looked into first: benchmarks/runtime.py would be what its neighbours import."""
    assert not {path.stem for path in (ROOT / "benchmarks").iterdir()} & set(HOUSES)


def light_modules() -> list[str]:
    """What must start without torch: running, merging, judging and everything below them."""
    single = ["edgelora", "edgelora.peft.adapter"]
    single += [f"edgelora.base.{name}" for name in ("ggml", "model", "fingerprint", "head")]
    single += [*(f"edgelora.{p.stem}" for p in (ROOT / "edgelora").glob("[a-z]*.py"))]
    rooms = [f"edgelora/{room}" for room in ("architectures", "data", "evaluate", "files")]
    whole = [module_of(p) for folder in (*rooms, "converters", "runtime") for p in (ROOT / folder).rglob("*.py")]
    return sorted({*single, *whole})


IMPORT_ALL = """
import importlib, sys
forbidden, *names = sys.argv[1:]
for name in names:
    importlib.import_module(name)
    if forbidden in sys.modules:
        sys.exit(f"{name} imports {forbidden}")
"""


@pytest.mark.parametrize("forbidden", ["torch", "llama_cpp"])
def test_light_modules_stay_light(forbidden):
    names = [n for n in light_modules() if forbidden == "torch" or not n.startswith("runtime")]
    done = python(IMPORT_ALL, forbidden, *names)
    assert done.returncode == 0, done.stderr


HELP = """
import sys
from edgelora.cli import run
code = run(sys.argv[1:])
sys.exit(code or " ".join({"torch", "llama_cpp", "numpy"} & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize("command", [[], ["doctor"], ["train"]])
def test_help_imports_nothing_heavy(command):
    done = python(HELP, *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout


def test_pyproject_lists_the_packages_on_disk():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({module_of(path.parent / "__init__.py") for path in sources()})


@pytest.mark.parametrize("folder", sorted({path.parent for path in sources()}), ids=lambda p: p.name)
def test_no_package_is_empty(folder):
    assert (folder / "__init__.py").exists()
    assert [path for path in folder.glob("*.py") if path.name != "__init__.py"]


@pytest.mark.parametrize(("command", "said"), [("doctor", "built with"), ("convert", "checked on")])
def test_the_current_folder_is_never_imported_from(tiny, tmp_path, command, said):
    """doctor imports torch, and runtime in a child; convert forks a child from a process that has imported torch."""
    for name in ("torch.py", "runtime/__init__.py", "converters/__init__.py", "llama_cpp.py", "typer.py"):
        decoy = tmp_path / name
        decoy.parent.mkdir(exist_ok=True)
        decoy.write_text("import pathlib\npathlib.Path(__file__).with_suffix('.taken').touch()\n", encoding="utf-8")
    words = [command, *([str(tiny.path), "--out", "out.gguf"] if command == "convert" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "edgelora", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr
    assert list(tmp_path.rglob("*.taken")) == []
