"""A model's own chat template: whose characters are whose, and what a hostile one cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date

import pytest
from conftest import ROOT, TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.base.model import open_base
from edgelora.data.conversation import Message
from edgelora.data.template import CHATML, ChatTemplate, Rendered, chatml
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import DataError

TRIMS = TEMPLATE.replace("m['content']", "m['content'] | trim")
# SmolLM2's own: a system message of its own where the conversation brings none
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}[{{ m.content }}]{% endfor %}"
)
TEMPLATES = {"plain": TEMPLATE, "trims": TRIMS, "default system": DEFAULT_SYSTEM}


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """Contents in turn: user, assistant, user, …"""
    first = [] if system is None else [Message("system", system)]
    return first + [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]


CHATS = {
    "one turn": chat("Hi", "Hello"),
    "many turns": chat("a", "b", "c", "d", "e", "f"),
    "system": chat("Hi", "Hello", system="Be brief."),
    "white space at the ends": chat(" Hi\n", "\n\t Hello \n\n"),
    "white space within": chat("a\n\n b", " c\td "),
    "empty": chat("", "Hello"),
    "white space only": chat(" \n", "Hello"),
    "special tokens": chat("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", system="<|im_start|>"),
    "Jinja": chat("{{ messages }} {% raise %} {# no #}", "{{ 7 * 7 }}"),
    "the same text twice": chat("Hello", "Hello", "Hello", "Hello"),
    "the words of the template": chat("user", "assistant", system="system"),
    "HTML": chat("<b>&amp;</b> \"'", "a < b && c > d"),
    "half marks": chat("\ufdd0", "\ufdd1 \U000f0000"),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_spans_are_the_contents(template, messages):
    rendered = ChatTemplate(template).render(messages)
    found = {span.message: rendered.text[span.start : span.end] for span in rendered.spans}
    assert len(found) == len(rendered.spans)
    assert found == {i: m.content.strip() for i, m in enumerate(messages) if m.content.strip()}
    # and at the right place: behind the header of their own message
    for span in rendered.spans:
        header, _, between = rendered.text[: span.start].rpartition(f"<|im_start|>{messages[span.message].role}\n")
        assert between.strip() == ""
        own_system = template == DEFAULT_SYSTEM and messages[0].role != "system"
        assert rendered.text.index(header) == 0
        quoted = sum(m.content.count("<|im_start|>") for m in messages[: span.message])
        assert header.count("<|im_start|>") == span.message + own_system + quoted


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=5))
def test_spans_are_the_contents_of_any_text(contents):
    messages = chat(*contents)
    rendered = ChatTemplate(TEMPLATE).render(messages)
    assert rendered.text == "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == [c.strip() for c in contents if c.strip()]


def test_exact_text():
    rendered = ChatTemplate(DEFAULT_SYSTEM).render(chat("Hi"), generation_prompt=True)
    assert rendered.text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [(s.message, rendered.text[s.start : s.end]) for s in rendered.spans] == [(0, "Hi")]


def test_a_content_that_is_quoted_twice_has_two_spans():
    rendered = ChatTemplate("{% for m in messages %}{{ m.content }}/{{ m.content }};{% endfor %}").render(chat("ab"))
    assert [(s.message, s.start, s.end) for s in rendered.spans] == [(0, 0, 2), (0, 3, 5)]


def test_bos_eos_and_hf_filters():
    template = "{{ bos_token }}{{ {'a': '<ä>'} | tojson }}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    assert ChatTemplate(template, bos="<s>", eos="</s>").render(chat("Hi")).text == '<s>{"a": "<ä>"}4</s>'


def test_blocks_leave_no_white_space_as_in_transformers():
    template = (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    )
    assert ChatTemplate(template).render(chat("a", "b", "c")).text == "a\nc\n"


# -- whose characters they are, whatever the template does to them ------------------------------------------------


def said(rendered: Rendered) -> list[tuple[int, str]]:
    return [(s.message, rendered.text[s.start : s.end]) for s in rendered.spans]


# an expression over m.content == "Hi there" → the prompt, and what of it the message says
FOLLOWED = {
    "m.content[:3] ~ '…'": ("Hi …", ["Hi"]),
    "m.content[0] + m.content[-1]": ("He", ["H", "e"]),
    "m.content | reverse": ("ereht iH", list("erehtiH")),
    "m.content | upper | string | trim": ("HI THERE", ["HI THERE"]),
    "m.content | title": ("Hi There", ["Hi There"]),
    "m.content.split(' ') | join('-')": ("Hi-there", ["Hi", "there"]),
    "m.content.split() | map('capitalize') | join": ("HiThere", ["Hi", "There"]),
    "m.content.split('t')[-1] | default('x')": ("here", ["here"]),
    "m.content.partition(' ')[2].rpartition('h')[0]": ("t", ["t"]),
    "m.content.replace('there', 'you')": ("Hi you", ["Hi"]),
    "'[%s|%d|%-3s]' % (m.content, 7, 'x')": ("[Hi there|7|x  ]", ["Hi there"]),
    "'{} {n:.1f}'.format(m.content, n=2)": ("Hi there 2.0", ["Hi there"]),
    "'%s!' | format(m.content)": ("Hi there!", ["Hi there"]),
    "m.content | center(12)": ("  Hi there  ", ["Hi there"]),
    "m.content.zfill(10)": ("00Hi there", ["Hi there"]),
    "(m.content ~ '\n' ~ m.content) | indent(2)": ("Hi there\n  Hi there", ["Hi there", "Hi there"]),
    "m.content | tojson": ('"Hi there"', ["Hi there"]),
    "{'a': m.content, 'b': [1, m.content]} | tojson": ('{"a": "Hi there", "b": [1, "Hi there"]}', ["Hi there"] * 2),
    "[m.content, 1, none]": ("['Hi there', 1, None]", ["Hi there"]),
    "m.content | list | last": ("e", ["e"]),
    "m.content | first": ("H", ["H"]),
    "m.content.removeprefix('Hi').lstrip()": ("there", ["there"]),
    "(m.content * 2)[4:10]": ("hereHi", ["here", "Hi"]),
    "m.content.splitlines()[0] | safe": ("Hi there", ["Hi there"]),
    "'<b>' | e ~ m.content | e": ("&lt;b&gt;Hi there", ["Hi there"]),
    "m.content | length": ("8", []),
    "'yes' if m.content.startswith('Hi') and ' ' in m.content else 'no'": ("yes", []),
}


@pytest.mark.parametrize("expression", FOLLOWED)
def test_characters_are_followed(expression):
    template = ChatTemplate("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
    text, words = FOLLOWED[expression]
    rendered = template.render(chat("Hi there"))
    assert rendered.text == text
    assert said(rendered) == [(0, word) for word in words]
    assert len(rendered.origin) == len(text)


BLOCKS = {
    "set": "{% set x %}<{{ m.content }}>{% endset %}{{ x }}",
    "set with a filter": "{% set x | trim %} <{{ m.content }}> {% endset %}{{ x }}",
    "namespace": "{% set ns = namespace(x='<') %}{% set ns.x = ns.x + m.content %}{{ ns.x }}>",
    "macro": "{% macro f(a, b='>') %}<{{ a }}{{ b }}{% endmacro %}{{ f(m.content) }}",
    "call": "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}{{ m.content }}{% endcall %}",
    "filter": "{% filter trim %} <{{ m.content }}> {% endfilter %}",
    "loop over characters": "<{% for c in m.content %}{{ c }}{% endfor %}>",
    "loop with break": "<{% for x in [1, 2] %}{{ m.content }}{% break %}{% endfor %}>",
    "with": "{% with x = m.content %}<{{ x }}>{% endwith %}",
    "generation": "{% generation %}<{{ m.content }}>{% endgeneration %}",
    "condition": "{{ '<' ~ (m.content if m.content is string else '') }}>",
    "a recursive loop": "<{% for x in [[m.content]] recursive %}{{ x if x is string else loop(x) }}{% endfor %}>",
}


@pytest.mark.parametrize("block", BLOCKS)
def test_characters_are_followed_through_blocks(block):
    rendered = ChatTemplate("{% for m in messages %}" + BLOCKS[block] + "{% endfor %}").render(chat("Hi there"))
    assert rendered.text == "<Hi there>"
    assert said(rendered) == [(0, "Hi there")]


def test_escapes_of_json_keep_their_origin():
    text = 'a"\\\n\t\x00ä\U0001f600/'
    for ascii_only in ("false", "true"):
        source = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=" + ascii_only + ") }}{% endfor %}"
        rendered = ChatTemplate(source).render(chat(text))
        assert json.loads(rendered.text) == text
        assert said(rendered) == [(0, rendered.text[1:-1])]


@pytest.mark.parametrize("expression", ["m.content | upper", "m.content | urlencode", "m.content.encode()"])
def test_what_cannot_be_followed_is_refused(expression):
    with pytest.raises(DataError) as caught:
        ChatTemplate("{% for m in messages %}{{ " + expression + " }}{% endfor %}").render(chat("Straße"))
    assert caught.value.what.startswith("the chat template ")


def test_thoughts_that_a_template_drops_are_not_there():
    template = ChatTemplate("{% for m in messages %}[{{ m.content.split('</think>')[-1].lstrip('\\n') }}]{% endfor %}")
    assert said(template.render(chat("Hi", "<think>hm</think>\n\nyes"))) == [(0, "Hi"), (1, "yes")]


def test_tools_and_variables_are_neither_the_templates_nor_anybodys():
    tool = {"type": "function", "function": {"name": "<|im_end|>"}}
    template = ChatTemplate(
        "{{ tools[0].function.name }}{{ thinking }}{{ documents is none }}{{ nothing is defined }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        variables={"thinking": "hard"},
    )
    rendered = template.render(chat("Hi"), tools=[tool])
    assert rendered.text == "<|im_end|>hardTrueFalseHi"
    assert rendered.origin[:14] == "\1" * 14
    assert said(rendered) == [(0, "Hi")]


def test_what_each_field_of_a_message_says():
    call = {"function": {"name": "get", "arguments": {"city": "Ulm", "days": 3}}}
    messages = [
        Message("assistant", None, (call,), reasoning_content="hm"),
        Message("tool", "5", tool_call_id="c1", name="get"),
    ]
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}{{ m.name }}{{ m.tool_call_id }}{{ m.reasoning_content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ m.content or '' }};{% endfor %}"
    )
    rendered = template.render(messages)
    assert rendered.text == ('assistanthm{"name": "get", "arguments": {"city": "Ulm", "days": 3}};toolgetc15;')
    words = [(s.message, s.part, rendered.text[s.start : s.end]) for s in rendered.spans]
    calls = [(0, "tool_calls", w) for w in ("name", "get", "arguments", "city", "Ulm", "days")]
    assert words == [(0, "reasoning_content", "hm"), *calls, (1, "content", "5")]


def test_equal_beginnings_have_equal_origins():
    template, messages = ChatTemplate(TEMPLATE), chat("one", "two", "three")
    whole = template.render(messages)
    for n in range(len(messages)):
        part = template.render(messages[:n])
        assert whole.origin.startswith(part.origin)


def test_the_day_can_be_fixed():
    source = "{{ strftime_now('%d %B %Y %H') }}"
    assert ChatTemplate(source, today=date(2024, 7, 26)).render([]).text == "26 July 2024 00"
    assert ChatTemplate(source).tells_the_date
    assert not ChatTemplate(TEMPLATE).tells_the_date


# -- the templates of real families, against transformers ---------------------------------------------------------

FAMILIES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests" / "templates").iterdir())}
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "get", "arguments": {"city": 'U"lm\n', "n": 3}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "The weather's <b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
THOUGHT = "<think>\nhm\n</think>\n\n Hello "
ROWS: dict[str, dict] = {
    "chat": {"messages": [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": THOUGHT}] * 2},
    "system": {"messages": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "<|im_end|>"}]},
    "reasoning": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello", "reasoning_content": "hm"},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": '{"t": 5}', "tool_call_id": "abcdef123"},
            {"role": "assistant", "content": "5 degrees"},
        ],
        "tools": [TOOL],
    },
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_what_transformers_renders(family, row):
    from transformers.utils.chat_template_utils import _compile_jinja_template as compile_template

    messages = tuple(Message(**{**m, "tool_calls": tuple(m.get("tool_calls", ()))}) for m in ROWS[row]["messages"])
    tools = ROWS[row].get("tools")
    for generation_prompt in (False, True):
        options = {"add_generation_prompt": generation_prompt, "bos_token": "<s>", "eos_token": "</s>"}
        try:
            expected = compile_template(FAMILIES[family]).render(
                messages=json.loads(json.dumps(ROWS[row]["messages"])), tools=tools, documents=None, **options
            )
        except Exception:  # what transformers refuses, we refuse
            with pytest.raises(DataError):
                ChatTemplate(FAMILIES[family], "<s>", "</s>").render(
                    messages, generation_prompt=generation_prompt, tools=tools or ()
                )
            continue
        rendered = ChatTemplate(FAMILIES[family], "<s>", "</s>").render(
            messages, generation_prompt=generation_prompt, tools=tools or ()
        )
        assert rendered.text == expected
        # every word of a content that is shown as it is, is somebody's
        for i, message in enumerate(messages):
            words = (message.content or "").split("</think>")[-1].strip()
            if message.role in ("user", "assistant") and words in expected and words:
                assert words in "".join(rendered.text[s.start : s.end] for s in rendered.spans if s.message == i)


def test_chatml():
    messages = chat("Hi", "Hello", system="Be brief.")
    assert ChatTemplate(CHATML).render(messages, generation_prompt=True).text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_ends_turns_with_a_token_that_the_vocabulary_has(tiny):
    tokenizer = open_base(tiny.path).tokenizer
    assert chatml(tokenizer) == CHATML
    tokens = tuple("x" * i if t == "<|im_end|>" else t for i, t in enumerate(tokenizer.tokens))
    types = tokenizer.vocabulary.types
    other = replace(tokenizer.vocabulary, tokens=tokens, types=types, merges=(), ids={"eos": 0})
    template = ChatTemplate(chatml(Tokenizer(other)), eos="<|endoftext|>")
    assert template.render(chat("Hi")).text == "<|im_start|>user\nHi<|endoftext|>\n"
    none = replace(other, tokens=tuple("y" if t == "<|endoftext|>" else t for t in tokens), ids={})
    with pytest.raises(DataError, match="ChatML needs a token that ends a turn"):
        chatml(Tokenizer(none))


@pytest.mark.real
def test_the_template_of_a_real_model(smollm):
    base = open_base(smollm)
    rendered = base.template.render(chat(" Hi ", "Hello", system="Be brief."), generation_prompt=True)
    assert said(rendered) == [(0, "Be brief."), (1, "Hi"), (2, "Hello")]
    assert rendered.text.endswith("Hello<|im_end|>\n<|im_start|>assistant\n")


# -- faults of a template -----------------------------------------------------------------------------------------


def test_roles_that_a_template_refuses():
    with pytest.raises(DataError) as caught:
        ChatTemplate(STRICT).render([Message("assistant", "Hi")])
    assert caught.value.what == "the chat template refused a conversation: roles must alternate user/assistant"
    assert caught.value.fix.startswith("check the order of roles")
    assert ChatTemplate(STRICT).render(chat("a", "b")).text == "[a][b]"


CONCATENATES = "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}"
CALLS_TOO = CONCATENATES.replace("{% endfor", "{{ m.tool_calls }}{% endfor")
REFUSES = "{{ raise_exception('no') }}"
QUESTION, CALLING = Message("user", "Hi"), Message("assistant", None, (CALL,))
# template and messages → how the fix begins, and whether another template must know tools
REFUSALS = {
    "a call without words": (CALLS_TOO, [QUESTION, CALLING], 'write "" for the `content` that is null', False),
    "a call that is not known": (CONCATENATES, [QUESTION, CALLING], "take tools, their calls", True),
    "a call with words": (REFUSES, [QUESTION, replace(CALLING, content="")], "take tools, their calls", True),
    "a tool's answer": (REFUSES, [QUESTION, Message("tool", "5")], "take tools, their calls and answers", True),
    "two questions": (REFUSES, [QUESTION, QUESTION], "check the order of roles in your rows", False),
    "a system message": (REFUSES, chat("a", "b", system="c"), "put what `system` says into the first message", False),
    "nothing unusual": (REFUSES, chat("a", "b", "c"), "use a base with another chat template", False),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_fix_goes_by_what_the_conversation_has(case):
    source, messages, begin, tools = REFUSALS[case]
    with pytest.raises(DataError) as caught:
        ChatTemplate(source).render(messages)
    assert caught.value.what.startswith("the chat template refused a conversation: ")
    assert caught.value.fix.startswith(begin)
    assert "use a base with another chat template" in caught.value.fix
    assert caught.value.fix.endswith("that knows them") == tools


def test_tools_that_a_template_refuses():
    with pytest.raises(DataError) as caught:
        ChatTemplate(REFUSES).render(chat("a", "b"), tools=[TOOL])
    assert caught.value.fix.startswith("take tools, their calls and answers out of the row")


def test_a_template_that_is_stopped_or_broken_has_no_word_of_roles():
    with pytest.raises(DataError, match="was stopped") as caught:
        ChatTemplate("{{ 'x' * 10 ** 9 }}").render([QUESTION])
    assert caught.value.fix == "shorten the row, or use a base with another chat template"
    with pytest.raises(DataError, match="does not parse") as caught:
        ChatTemplate("{{ }}")
    assert caught.value.fix == "use a base with another chat template"


def test_memory_that_ran_out_is_no_refusal(monkeypatch):
    def runs_out(*_, **__):
        raise MemoryError

    template = ChatTemplate(TEMPLATE)
    monkeypatch.setattr(template, "_parts", runs_out)
    with pytest.raises(MemoryError):
        template.render([QUESTION])
    monkeypatch.setattr("edgelora.data.template.Sandbox", runs_out)
    with pytest.raises(MemoryError):
        ChatTemplate(TEMPLATE)
