"""Options out of a pydantic model, settings out of TOML: each default stands once, and what is wrong is named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typer.testing import CliRunner

from edgelora.cli import app
from edgelora.cli import run as app_run
from edgelora.cli.options import as_toml, read_toml, settled, with_options
from edgelora.config import Source, TrainConfig
from edgelora.errors import ConfigError
from edgelora.faults import MEANT, meant, values_of


class Recipe(BaseModel):
    """A field of each kind that an option can have."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")

    dish: Path
    """What it becomes."""
    minutes: int = Field(30, ge=1)
    """How long it takes."""
    salt: float | None = None
    """In grams."""
    kind: Literal["soup", "cake"] = "soup"
    """What kind it is."""
    spicy: bool = False
    """Whether it burns."""
    herbs: tuple[str, ...] = ()
    """What is strewn
    over it."""


@pytest.fixture
def cook():
    """(a runner of the command line, what the command was called with)."""
    asked: list[dict] = []
    kitchen = typer.Typer()

    @kitchen.command()
    @with_options(Recipe, skip={"dish"}, panels={"minutes": "Time", "kind": "Taste"})
    def command(dish: Path, **settings):
        asked.append({"dish": dish, **settings})

    return (lambda *words: CliRunner().invoke(kitchen, list(words))), asked


# -- options ------------------------------------------------------------------------------------------------------


def test_what_is_not_given_is_none_so_that_defaults_stand_in_the_model_alone(cook):
    run, asked = cook
    assert run("stew").exit_code == 0
    assert {name: value for name, value in asked[0].items() if value not in (None, [])} == {"dish": Path("stew")}
    assert settled(Recipe, None, asked[0]) == Recipe(dish=Path("stew"))


def test_each_kind_of_field_is_an_option(cook):
    run, asked = cook
    words = "--minutes 5 --salt 0.5 --kind cake --spicy --herbs thyme --herbs sage"
    assert run("stew", *words.split()).exit_code == 0
    found = settled(Recipe, None, asked[0])
    assert found == Recipe(dish="stew", minutes=5, salt=0.5, kind="cake", spicy=True, herbs=("thyme", "sage"))


def test_a_flag_can_be_taken_back_from_a_file(cook, tmp_path):
    run, asked = cook
    (tmp_path / "recipe.toml").write_text("spicy = true\n", encoding="utf-8")
    run("stew", "--no-spicy")
    run("stew")
    assert [settled(Recipe, tmp_path / "recipe.toml", given).spicy for given in asked] == [False, True]


@pytest.mark.parametrize("words", [["--minutes", "many"], ["--kind", "salad"], ["--dish", "stew"]])
def test_what_cannot_be_read_is_wrong_usage(cook, words):
    run, asked = cook
    assert run("stew", *words).exit_code == 2
    assert asked == []


def test_a_misspelt_value_is_answered_with_the_nearest(cook, tmp_path):
    run, _ = cook
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("stew", "--kind", "suop").output).split())
    assert "'--kind': suop is none of its values, did you mean soup? it is one of soup, cake" in shown
    (tmp_path / "recipe.toml").write_text("dish = 'stew'\nkind = 'salad'\n", encoding="utf-8")
    with pytest.raises(ConfigError) as fault:
        settled(Recipe, tmp_path / "recipe.toml", {})
    assert fault.value.what == f"{tmp_path / 'recipe.toml'}: kind: salad is none of its values: it is one of soup, cake"


def test_a_misspelt_method_is_answered_with_where_they_stand(capsys):
    assert app_run(["train", "b.gguf", "rows.jsonl", "--out", "mine", "--method", "lroa"]) == 2
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert "'--method': lroa is none of its values, did you mean lora? `edgelora methods` lists all" in shown


@pytest.mark.parametrize(("word", "method", "why"), [
    ("qlora", "lora", "it is a LoRA over a quantized base"), ("Q-LoRA", "lora", "it is a LoRA over a quantized base"),
    ("qdora", "dora", "it is a DoRA over a quantized base"),
    ("QPiSSA", "loftq", "it is a LoRA that starts as what was taken out of its base before that was quantized"),
    ("rs-lora", "rslora", "it is another spelling of rslora"),
    ("lora+", "loraplus", "it is another spelling of loraplus"),
    ("(IA)3", "ia3", "it is another spelling of ia3"), ("ptuning", "p_tuning", "it is another spelling of p_tuning"),
    ("P-Tuning v2", "prefix_tuning", "it is what trains keys and values of every layer"),
    ("layer-norm", "layernorm", "it is another spelling of layernorm"),
    ("full-finetune", "full", "it is full fine-tuning"),
])  # fmt: skip
def test_a_method_by_another_name_is_told_what_to_type(capsys, word, method, why):
    """And is not taken for it unasked; nor is QPiSSA taken for PiSSA, which is the word that is nearest."""
    assert app_run(["train", "b.gguf", "rows.jsonl", "--out", "mine", "--method", word]) == 1
    what, told, fix = capsys.readouterr().err.splitlines()
    assert what == f"error: --method {word}: this is none of its values"
    assert told == f"  why: {why}"
    assert fix.startswith("  fix: ")
    assert re.findall(r"--method (\w+)", fix) == [method]


def test_an_objective_is_no_method(capsys):
    assert app_run(["train", "b.gguf", "rows.jsonl", "--out", "mine", "--method", "dpo"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "  fix: --objective dpo, with any method"


def test_another_name_in_a_file_is_told_what_to_type(tmp_path):
    (tmp_path / "mine.toml").write_text("method = 'qlora'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="it is a LoRA over a quantized base, which is written --method lora over"):
        settled(TrainConfig, tmp_path / "mine.toml", {"base": "b", "data": ["d"], "out": "o"})


SETTINGS = {name: values for name, field in TrainConfig.model_fields.items() if (values := values_of(field))}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_differ_in_more_than_their_spelling(name):
    """Else one would be told to type the other."""
    option = f"--{name.replace('_', '-')}"
    for value in SETTINGS[name]:
        assert meant(name, SETTINGS[name], value.upper().replace("_", "-")).write == f"{option} {value}"


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, table in MEANT.items() for word in table])
def test_what_is_meant_is_no_value_and_can_be_typed(name, word):
    write = MEANT[name][word].write
    assert meant(name, SETTINGS[name], word) is MEANT[name][word]  # no value has this spelling
    typed = re.findall(r"--([a-z][a-z-]*) (\S+?)(?:,|\s|$)", re.sub(r"`.*`", "", write))
    assert typed
    for option, value in typed:
        setting = option.replace("-", "_")
        assert setting in TrainConfig.model_fields
        assert value in SETTINGS.get(setting, (value,))


def test_help_is_the_docstring_and_the_default_under_its_heading(cook):
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", cook[0]("--help").output).split())
    assert "How long it takes. Default: 30." in shown
    assert "In grams. " in shown
    assert "In grams. Default" not in shown  # left open: chosen later
    assert "What is strewn over it." in shown
    assert shown.index(" Time ") < shown.index("--salt") < shown.index(" Taste ") < shown.index("--herbs")


def test_train_has_an_option_for_every_setting():
    command = typer.main.get_command(app).commands["train"]
    options = {parameter.name: parameter for parameter in command.params}
    assert set(TrainConfig.model_fields) <= set(options)
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        if name not in ("base", "data"):
            assert options[name].opts == [f"--{name.replace('_', '-')}"]
            assert options[name].default is None


# -- settings -----------------------------------------------------------------------------------------------------


def test_options_override_the_file_and_the_file_the_model(tmp_path):
    (tmp_path / "recipe.toml").write_text("dish = 'stew'\nminutes = 5\nsalt = 1\n", encoding="utf-8")
    found = settled(Recipe, tmp_path / "recipe.toml", {"minutes": 7, "salt": None, "herbs": []})
    assert found == Recipe(dish="stew", minutes=7, salt=1.0)


def test_every_fault_is_named_as_it_was_written(tmp_path):
    (tmp_path / "recipe.toml").write_text("dish = 'stew'\nsalt = 'much'\n", encoding="utf-8")
    with pytest.raises(ConfigError) as fault:
        settled(Recipe, tmp_path / "recipe.toml", {"minutes": 0})
    first, second = fault.value.what.split("; ")
    assert first == "--minutes: it is 0, and must be at least 1"
    assert second == f"{tmp_path / 'recipe.toml'}: salt: it is much, and must be a number"
    assert fault.value.fix == "`edgelora train --print-config` prints each setting with what it is"


WRONG = {
    "rank": {0: "it is 0, and must be at least 1", 2000: "it is 2000, and must be at most 1024",
             "many": "it is many, and must be a whole number", 1.5: "it is 1.5, and must be a whole number"},
    "alpha": {0: "it is 0, and must be above 0", "inf": "it is inf, and must be a finite number"},
    "lora_dropout": {1: "it is 1, and must be below 1"},
    "truncate": {"maybe": "it is maybe, and must be true or false"},
    "samples": {3: "it is 3, and must be a list", (3,): "it is 3, and must be a text"},
    "invocation": {"": "it is empty, and must not be"},
    "max_gpu_memory": {"8": r"it is 8, and must match ^\d+(\.\d+)?\s*(GB|GiB|MB|MiB)$"},
    "rank_pattern": {"q_proj": "q_proj is no NAME=NUMBER, such as q_proj=4"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "said"), [(n, v, s) for n, of in WRONG.items() for v, s in of.items()])
def test_what_is_wrong_with_a_setting_is_said_in_our_words(name, value, said):
    with pytest.raises(ConfigError) as fault:
        settled(TrainConfig, None, {"base": "b", "data": "d", "out": "o", name: value}, command="plan")
    assert fault.value.what == f"--{name.replace('_', '-')}: {said}"
    assert fault.value.fix == "see `edgelora plan --help`"


def test_python_is_told_the_same_by_the_names_of_settings():
    """Of what was read back, `model_validate` raises pydantic's own, as of other files."""
    whole = {"base": "b", "data": "d", "out": "o"}
    with pytest.raises(ConfigError) as fault:
        TrainConfig(**whole, method="qlora", rank=0, learning_rte=1e-4)
    method, rank, rate = fault.value.what.split("; ")
    assert method.startswith("method: qlora is none of its values: it is a LoRA over a quantized base, which is ")
    assert rank == "rank: it is 0, and must be at least 1"
    assert rate == "learning_rte: there is no such setting, did you mean learning_rate?"
    with pytest.raises(ConfigError, match="out: it has to be said"):
        TrainConfig(base="b", data="d")
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({**whole, "rank": 0})
    assert TrainConfig(**whole, rank="4") == TrainConfig.model_validate({**whole, "rank": 4})


def test_what_is_missing_in_both_places_is_wrong_usage():
    with pytest.raises(typer.BadParameter) as fault:
        settled(Recipe, None, {"dish": None, "minutes": None}, arguments=("dish",))
    assert fault.value.param_hint == ["DISH"]


def test_unknown_settings_are_refused_with_the_nearest_name(tmp_path):
    (tmp_path / "recipe.toml").write_text("minuets = 5\nzzz = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as fault:
        read_toml(tmp_path / "recipe.toml", Recipe)
    assert str(fault.value).splitlines() == [
        f"{tmp_path / 'recipe.toml'}: unknown settings: minuets (did you mean minutes?), zzz",
        "  why: a misspelt setting would be silently ignored",
        "  fix: `edgelora train --print-config` prints them all",
    ]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("lr = 1e-4", "lr (did you mean learning_rate?)"),
        ("output_dir = 'mine'", "output_dir (did you mean out?)"),
        ("[train]\nrank = 4", "the table train (settings stand without one)"),
    ],
)
def test_what_other_programs_write_is_answered_with_our_names(tmp_path, written, said):
    (tmp_path / "train.toml").write_text(written, encoding="utf-8")
    with pytest.raises(ConfigError) as fault:
        read_toml(tmp_path / "train.toml", TrainConfig)
    assert fault.value.what.endswith(f"unknown settings: {said}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"out": "."}, "out: '.' has no name"),
        ({"out": "/"}, "out: '/' has no name"),
        ({"out": ""}, "out: '.' has no name"),
        ({"out": "a/.."}, "out: 'a/..' has no name"),
        ({"out": "gr\udcf6sse"}, "out: 'gr\\udcf6sse' is not in UTF-8: rename it"),
        ({"data": ["a.jsonl", "\udcf6"]}, "data: '\\udcf6' is not in UTF-8"),
        ({"rank": True}, "rank: true is none of its values"),
        ({"epochs": False}, "epochs: false is none of its values"),
        ({"data": None}, "data: None is no path"),
        ({"data": {"path": "rows.jsonl"}}, "data: {'path': 'rows.jsonl'} is no path; a weight stands behind one"),
        ({"data": [{"path": "rows.jsonl", "weight": 0.5}]}, "data: {'path': 'rows.jsonl', 'weight': 0.5} is no path"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_told_as_a_fault_of_its_setting(settings, told):
    with pytest.raises(ConfigError) as fault:
        TrainConfig(**{"base": "b", "data": "d", "out": "o", **settings})
    assert fault.value.what.startswith(told)


@pytest.mark.parametrize("content", [b"minutes = ", b"minutes = \xff", b"[minutes", b"a = 1\na = 2\n"])
def test_what_is_no_toml_is_refused(tmp_path, content):
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(ConfigError, match="no TOML file that can be read"):
        read_toml(tmp_path / "recipe.toml", Recipe)


# -- printing -----------------------------------------------------------------------------------------------------


def test_what_is_printed_has_each_setting_under_its_docstring():
    assert as_toml(Recipe(dish="stew", herbs=("sage",))).splitlines() == [
        "# What it becomes.", 'dish = "stew"', "",
        "# How long it takes.", "minutes = 30", "",
        "# In grams.", "# salt = ", "",
        "# What kind it is.", 'kind = "soup"', "",
        "# Whether it burns.", "spicy = false", "",
        "# What is strewn over it.", 'herbs = ["sage"]',
    ]  # fmt: skip


@given(
    st.text(st.characters(exclude_categories=["Cs"])), st.floats(1e-300, 1e300), st.lists(st.text("a\"\\\n\x7f'é💡#"))
)
def test_what_is_printed_is_read_again_as_it_was(dish, salt, herbs):
    recipe = Recipe(dish=Path(dish or "x"), salt=salt, herbs=tuple(herbs))
    assert Recipe.model_validate(tomllib.loads(as_toml(recipe))) == recipe


@given(st.floats(1e-6, 1000), st.sampled_from(["a.jsonl", "b:c.jsonl", "rows:0.5", "a:1"]))
def test_a_weight_is_told_to_its_last_bit(weight, name):
    """A command to go on with must ask for the very same run."""
    config = TrainConfig(base="b", data=[Source(Path(name), weight)], out="o")
    assert TrainConfig(base="b", data=str(config.data[0]), out="o").data == config.data


def test_a_mixture_is_printed_as_it_is_typed():
    data = (Source(Path("a.jsonl")), Source(Path("b:c.jsonl"), 0.5))
    config = TrainConfig(base="base.gguf", data=data, out="mine", learning_rate=1e-5)
    printed = tomllib.loads(as_toml(config))
    assert printed["data"] == ["a.jsonl", "b:c.jsonl:0.5"]
    assert TrainConfig.model_validate(printed) == config
