"""`--for`: what ollama, LM Studio and llama-server get says the same to the model as its own template does."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_export import make_adapter

from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.data.go_template import FAMILIES, go_template, render
from edgelora.data.rows import Message
from edgelora.errors import ConfigError, ExportError, OutputError
from edgelora.files.contract import Contract
from edgelora.peft.adapter import write_adapter, write_folder
from edgelora.peft.soft_prompt import SAVED
from edgelora.pipeline.ollama import ends_of_turns, ollama_template
from edgelora.pipeline.runners import MOST_CONTEXT, RUNNERS, Served, prepare, prepare_for
from edgelora.pipeline.torch_states import Reference

SAID = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
JINJA = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Llama 3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "Gemma": "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "Phi-3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "Zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "Granite 3": "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
}


# -- Go's language ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a {{- /**/ }}", None),
        ("{{ .System }}", ""),
        ("a \n {{- if .System }}no{{ else }}yes{{ end -}}  \n b", "ayesb"),
        ("{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}", "[user:Hi][assistant:Hello.][user:Bye]"),
        (
            '{{ range $i, $_ := .Messages }}{{ if and (eq .Role "user") (not (eq $i 0)) }}{{ $i }}{{ end }}{{ end }}',
            "2",
        ),
        ('{{ if eq 1 2 }}a{{ else if ne "x" "x" }}b{{ else if or "" 0 1 }}c{{ else }}d{{ end }}', "c"),
        ("{{ len .Messages }}{{ len (.System) }}", "30"),
        ("{{ if .System }}never closed", None),
        ("{{ end }}", None),
        ("{{ .Messages | json }}", None),
        ("{{ printf 1 }}", None),
        ("{{ if (eq 1 1 }}a{{ end }}", None),
    ],
)
def test_the_part_of_gos_language_that_is_used(source, text):
    """The values are those of text/template's documentation: trimming, `and`/`or` give an argument, 0 and "" fail."""
    if text is None:
        with pytest.raises(ValueError, match=r"end|beyond|closed|beginning"):
            render(source, SAID)
    else:
        assert render(source, SAID) == text


def test_ollama_joins_neighbours_of_one_role_and_all_system_messages():
    said = [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d")]
    assert render("{{ .System }}|{{ range .Messages }}{{ .Role }}={{ .Content }};{{ end }}", said) == (
        "a\n\nb|system=a\n\nb;user=c\n\nd;"
    )


# -- ollama -------------------------------------------------------------------------------------------------------


def test_every_family_has_a_template_to_be_held_against():
    assert JINJA.keys() == {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", JINJA)
def test_a_family_is_found_by_what_it_renders(make_tiny, name):
    """Oracle: Jinja. The family's own template, and the same with a system message of its own where there is none."""
    base = open_base(make_tiny(template=JINJA[name]).path)
    family, template = ollama_template(base)
    assert family.name == name
    for said in (SAID, [("system", "Be brief."), *SAID]):
        wanted = base.template.render([Message(*m) for m in said], generation_prompt=True).text
        assert render(template, said) == wanted


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n{% endif %}" + JINJA["ChatML"]
)


def test_a_system_message_that_the_template_adds_is_added_by_ollama(make_tiny):
    _, template = ollama_template(open_base(make_tiny(template=DEFAULT_SYSTEM).path))
    assert render(template, SAID).startswith("<|im_start|>system\nYou are Tiny.<|im_end|>\n<|im_start|>user\nHi")
    assert "Tiny" not in render(template, [("system", "Be brief."), *SAID])


@pytest.mark.parametrize("words", ["Say {{x}} or {{{y}}}.", "{", "a }} b{{", "{{ end }}"])
def test_braces_in_a_system_message_are_no_actions(make_tiny, words):
    _, template = ollama_template(
        open_base(make_tiny(template=DEFAULT_SYSTEM.replace("You are Tiny.", f"{{% raw %}}{words}{{% endraw %}}")).path)
    )
    assert render(template, SAID).startswith(f"<|im_start|>system\n{words}<|im_end|>\n<|im_start|>user\nHi")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}",
        JINJA["ChatML"].replace("<|im_end|>\n{%", "<|im_end|>{%"),
        "{% for m in messages %}{% if loop.index0 < 2 %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
    ids=["unknown", "one newline less", "only two messages"],
)
def test_a_template_that_ollama_would_render_otherwise_is_refused(make_tiny, tmp_path, template):
    base = open_base(make_tiny(template=template).path)
    with pytest.raises(ExportError) as error:
        prepare("ollama", Served(base, tmp_path / "m.gguf"))
    assert "not one that edgelora can write in Go's language" in error.value.what
    assert "--for llama-server" in error.value.fix


def test_a_turn_that_ends_in_no_end_is_refused(make_tiny):
    template = JINJA["ChatML"].replace("<|im_end|>", "<|im_start|>")
    with pytest.raises(ExportError, match="ends no answer"):
        ends_of_turns(open_base(make_tiny(template=template).path))


def test_a_modelfile(tiny, tmp_path):
    base = open_base(tiny.path)
    delivery = prepare("ollama", Served(base, tmp_path / "mine.gguf"))
    delivery.write()
    assert (tmp_path / "mine.Modelfile").read_text(encoding="utf-8") == (
        "FROM ./mine.gguf\n"
        f'TEMPLATE """{go_template(FAMILIES[0])}"""\n'
        'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n'
    )
    assert delivery.command == f"ollama create mine -f {tmp_path / 'mine.Modelfile'} && ollama run mine"
    live = prepare("ollama", Served(base, tiny.path, tmp_path / "live.gguf")).texts[tmp_path / "live.Modelfile"]
    assert live.splitlines()[:2] == [f"FROM {tiny.path}", "ADAPTER ./live.gguf"]


# -- the system message of the training ---------------------------------------------------------------------------

TAUGHT = 'You switch "lights".\nSay on or off.'


def taught(base, *systems: str | None, single_turn: bool = False) -> tuple[Contract, ...]:
    """Contracts of adapters that were trained with these system messages."""
    contract = make_adapter(base).contract
    return tuple(contract.model_copy(update={"system": said, "single_turn": single_turn}) for said in systems)


def test_ollama_says_what_the_adapter_was_trained_with(tiny, tmp_path):
    base = open_base(tiny.path)
    served = Served(base, tmp_path / "m.gguf", contracts=taught(base, TAUGHT, TAUGHT))
    text = prepare("ollama", served).texts[tmp_path / "m.Modelfile"]
    assert f'SYSTEM """{TAUGHT}"""\nPARAMETER' in text
    with pytest.raises(ExportError, match="cannot be written into a Modelfile"):
        prepare("ollama", Served(base, tmp_path / "m.gguf", contracts=taught(base, 'a """ b')))


@pytest.mark.parametrize(
    ("template", "said"),
    [(JINJA["ChatML"].replace("m.content }}", "m.content | trim }}"), "on or off\n"), (DEFAULT_SYSTEM, "")],
    ids=["trimmed", "empty, where silence says another one"],
)
def test_a_system_message_that_ollama_would_render_otherwise_is_refused(make_tiny, tmp_path, template, said):
    base = open_base(make_tiny(template=template).path)
    prepare("ollama", Served(base, tmp_path / "m.gguf", contracts=taught(base, "on or off")))
    with pytest.raises(ExportError, match="not one that edgelora can write in Go's language"):
        prepare("ollama", Served(base, tmp_path / "m.gguf", contracts=taught(base, said)))


def test_who_runs_it_elsewhere_is_told_what_to_send_first(tiny, tmp_path):
    base = open_base(tiny.path)
    first = json.dumps({"role": "system", "content": TAUGHT})
    (tmp_path / "m.gguf").write_bytes(b"model")
    for runner in ("llama-server", "lmstudio"):
        told = prepare(runner, Served(base, tmp_path / "m.gguf", contracts=taught(base, TAUGHT, single_turn=True)))
        assert any(note.endswith(first) for note in told.notes)
        assert any("ask each one in a conversation of its own" in note for note in told.notes)
        assert not any("trained" in note for note in prepare(runner, Served(base, tmp_path / "m.gguf")).notes)
    script = prepare("llama-server", Served(base, tmp_path / "m.gguf", contracts=taught(base, TAUGHT)))
    lines = script.texts[tmp_path / "m.llama-server.sh"].splitlines()
    assert lines[1].startswith("# ")
    assert lines[1].endswith(first)
    assert lines[2].startswith("exec llama-server -m")


@pytest.mark.parametrize("runner", RUNNERS)
def test_adapters_that_were_told_different_things_are_told_nothing(tiny, tmp_path, runner):
    base = open_base(tiny.path)
    delivery = prepare(runner, Served(base, tmp_path / "m.gguf", contracts=taught(base, "on", None)))
    assert "its adapters were trained with different system messages, so none is said" in delivery.notes
    assert not any("SYSTEM" in text for text in delivery.texts.values())


@pytest.mark.real
def test_the_real_base_goes_to_ollama(smollm):
    base = open_base(smollm)
    family, template = ollama_template(base)
    assert family.name == "ChatML"
    assert "You are a helpful AI assistant named SmolLM" in template
    assert "<|im_end|>" in ends_of_turns(base)


# -- LM Studio and llama-server -----------------------------------------------------------------------------------


def test_lm_studio_finds_the_file_where_it_looks(tiny, tmp_path):
    model = tmp_path / "mine-Q4.gguf"
    model.write_bytes(b"model")
    delivery = prepare("lmstudio", Served(open_base(tiny.path), model))
    delivery.write()
    place = tmp_path / "edgelora" / "mine-Q4" / "mine-Q4.gguf"
    assert place.read_bytes() == b"model"
    assert place.stat().st_ino == model.stat().st_ino  # no second copy of it
    assert delivery.command == f"lms import --user-repo edgelora/mine-Q4 --copy {model}"


def test_lm_studio_gets_a_copy_where_no_link_can_be_made(tiny, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    model = tmp_path / "mine.gguf"
    model.write_bytes(b"model")
    monkeypatch.setattr(os, "link", refuse)
    prepare("lmstudio", Served(open_base(tiny.path), model)).write()
    assert (tmp_path / "edgelora" / "mine" / "mine.gguf").read_bytes() == b"model"


def test_lm_studio_runs_no_adapters(tiny, tmp_path):
    with pytest.raises(ConfigError) as error:
        prepare("lmstudio", Served(open_base(tiny.path), tiny.path, tmp_path / "live.gguf"))
    assert "whole models only" in error.value.why
    assert "edgelora merge" in error.value.fix


def test_llama_server_gets_its_words_in_a_script_that_runs(tiny, tmp_path):
    """The script is run, with a llama-server in its place that says what it was given."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    delivery = prepare("llama-server", Served(open_base(tiny.path), folder / "m.gguf", folder / "a.gguf"))
    delivery.write()
    fake = tmp_path / "bin" / "llama-server"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    said = subprocess.run(
        [folder / "a.llama-server.sh", "--port", "1"], env={"PATH": f"{fake.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert said == [
        "-m", str(folder / "m.gguf"), "--lora-scaled", f"{folder / 'a.gguf'}:1.0", "--cache-ram", "0", "-c", "512",
        "--port", "1",
    ]  # fmt: skip
    assert shlex.split(delivery.command)[1:] == said[:-2]


def test_llama_server_gets_no_more_context_than_a_machine_has_room_for(make_tiny, tmp_path):
    base = open_base(make_tiny().path)
    base = replace(base, config=replace(base.config, max_position_embeddings=131072))
    assert base.context == 131072
    assert prepare("llama-server", Served(base, tmp_path / "m.gguf")).command.endswith(f"-c {MOST_CONTEXT}")


def test_a_template_that_the_file_lacks_goes_to_llama_server_with_it(make_tiny, tmp_path):
    base = open_base(make_tiny(template=None).path, "chatml")
    delivery = prepare("llama-server", Served(base, base.path, tmp_path / "a.gguf"))
    assert delivery.texts[tmp_path / "a.jinja"] == base.chosen_template
    assert f"--jinja --chat-template-file {tmp_path / 'a.jinja'}" in delivery.command


def test_a_name_that_llama_server_would_cut_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="cannot be given an adapter of this name"):
        prepare("llama-server", Served(open_base(tiny.path), tiny.path, tmp_path / "a:1.gguf"))


def test_an_unknown_program_and_what_stands_in_the_way_are_refused(tiny, tmp_path):
    served = Served(open_base(tiny.path), tmp_path / "m.gguf")
    with pytest.raises(ConfigError) as error:
        prepare("vllm", served)
    assert all(name in error.value.fix for name in RUNNERS)
    with pytest.raises(ConfigError, match="is not named as a GGUF file"):
        prepare("lmstudio", Served(served.base, tmp_path / "folder"))
    (tmp_path / "m.Modelfile").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        prepare("ollama", served)
    prepare("ollama", served, overwrite=True).write()
    assert (tmp_path / "m.Modelfile").read_text(encoding="utf-8").startswith("FROM")


# -- the command --------------------------------------------------------------------------------------------------


def test_export_for_a_program_writes_its_file_and_says_what_to_type(tiny, tmp_path, capfd):
    write_adapter(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    words = ["export", str(tiny.path), str(tmp_path / "mine"), "--out", str(tmp_path / "a.gguf"), "--for", "ollama"]
    assert run([*words, "--json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert found["for"].pop("notes")
    assert found["for"] == {"files": [str(tmp_path / "a.Modelfile")], "command": f"ollama create a -f "
                            f"{tmp_path / 'a.Modelfile'} && ollama run a"}  # fmt: skip
    assert "ADAPTER ./a.gguf" in (tmp_path / "a.Modelfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("scales", [("1", "0"), ("0", "1")], ids=["the first", "the second"])
def test_the_system_message_is_that_of_the_adapters_that_count(tiny, tmp_path, scales):
    base = open_base(tiny.path)
    words = ["merge", str(tiny.path), "--to", "F16", "--out", str(tmp_path / "m.gguf"), "--for", "ollama"]
    for said, scale in zip(("lights", "music"), scales, strict=True):
        write_adapter(tmp_path / said, replace(make_adapter(base), contract=taught(base, said)[0]))
        words += ["--adapter", f"{tmp_path / said}:{scale}"]
    assert run(words) == 0
    wanted = "lights" if scales[0] == "1" else "music"
    assert f'SYSTEM """{wanted}"""' in (tmp_path / "m.Modelfile").read_text(encoding="utf-8")


def test_what_a_program_cannot_run_is_refused_before_the_work(tiny, tmp_path, capfd):
    write_adapter(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    words = ["export", str(tiny.path), str(tmp_path / "mine"), "--out", str(tmp_path / "a.gguf"), "--for", "lmstudio"]
    assert run(words) == ConfigError.exit_code
    assert "whole models only" in capfd.readouterr().err
    assert [p.name for p in Path(tmp_path).iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("kind", "said", "fix"),
    [("an aLoRA", "waits for its invocation", "--for llama-server"), ("a prompt", "stands before prompts", "chat`")],
)
def test_what_acts_elsewhere_than_on_every_token_goes_to_no_program_that_does_not_know(tiny, tmp_path, kind, said, fix):
    base, folder = open_base(tiny.path), tmp_path / "mine"
    if kind == "a prompt":
        write_folder(folder, {"peft_type": "PROMPT_TUNING"}, {SAVED: np.zeros((2, 256), np.float32)}, None)
    else:
        write_adapter(folder, make_adapter(base, alora_invocation_tokens=[500, 77]))
    reference, out = Reference(tiny.path, ((folder, 1.0),)), tmp_path / "a.gguf"
    with pytest.raises(ConfigError, match=said) as refused:
        prepare_for("ollama", reference, out, live=True, overwrite=False)
    assert fix in refused.value.fix
    if kind == "an aLoRA":
        assert prepare_for("llama-server", reference, out, live=True, overwrite=False).texts


def test_merge_for_a_program_names_the_merged_file(tiny, tmp_path, capfd):
    write_adapter(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    words = ["merge", str(tiny.path), "--adapter", str(tmp_path / "mine"), "--out", str(tmp_path / "m.gguf")]
    assert run([*words, "--to", "Q8_0", "--for", "lmstudio", "--json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert found["for"]["files"] == [str(tmp_path / "edgelora" / "m" / "m.gguf")]
    assert found["certificate"]["passed"]
    assert "llama.cpp computes what torch does over these weights" in said.err
    assert (tmp_path / "edgelora" / "m" / "m.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
