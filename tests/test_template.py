"""A model's own chat template: whose characters are whose, and what a hostile one cannot do."""

from __future__ import annotations

import time

import pytest
from conftest import TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.data.conversation import Message
from edgelora.data.template import MAX_RENDERED_CHARACTERS, ChatTemplate
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


@pytest.mark.parametrize(
    "expression",
    [
        "{{ m.content | length }}",
        "{{ m.content[:3] }}",
        "{{ m.content[0] }}{{ m.content }}",
        "{% if m.content.startswith('Hi') %}!{% endif %}{{ m.content }}",
        "{% if m.content == 'Hi there' %}!{% endif %}{{ m.content }}",
        "{{ m.content | urlencode }}",
        "{{ m.content | reverse }}",
    ],
)
def test_a_template_that_looks_inside_is_refused(expression):
    with pytest.raises(DataError) as caught:
        ChatTemplate("{% for m in messages %}" + expression + "{% endfor %}").render(chat("Hi there", "b"))
    assert caught.value.what.startswith("the chat template ")
    assert "refused" not in caught.value.what


@pytest.mark.parametrize("answer", ["<think>hm</think>yes", "yes"])
def test_a_template_that_drops_thoughts_loses_no_span_unseen(answer):
    # as in Qwen3 and DeepSeek: what stands before </think> is cut off, and the mark at its beginning with it
    template = "{% for m in messages %}[{{ m.content.split('</think>')[-1] }}]{% endfor %}"
    try:
        rendered = ChatTemplate(template).render(chat("Hi", answer))
    except DataError:
        return
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == ["Hi", "yes"]


# -- faults of a template -----------------------------------------------------------------------------------------


def test_roles_that_a_template_refuses():
    with pytest.raises(DataError) as caught:
        ChatTemplate(STRICT).render([Message("assistant", "Hi")])
    assert caught.value.what == "the chat template refused a conversation: roles must alternate user/assistant"
    assert caught.value.fix.startswith("check the order of roles")
    assert ChatTemplate(STRICT).render(chat("a", "b")).text == "[a][b]"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ }}",
        "{{ 'x' | no_such_filter }}",
        "{% no_such_tag %}",
        "{% include 'x' %}{{",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30,
    ],
    ids=lambda s: s[:30],
)
def test_a_template_that_does_not_parse(source):
    with pytest.raises(DataError, match="does not parse"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{{ no_such_function() }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "{{ 'a' * 10 ** 15 }}",
        "{{ '%d' | format('a') }}",
        "{{ '{5}'.format(1) }}",
        "{{ '{a}'.format(1) }}",
        "{{ 'a'.encode('no-such-code') }}",
        "{{ [].pop() }}",
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now(1) }}",
        "{{ messages.append(1) }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_that_fails(source):
    with pytest.raises(DataError, match="refused a conversation"):
        ChatTemplate(source).render(chat("Hi"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(DataError, match="refused a conversation"):
        ChatTemplate(source).render(chat("Hi"))


LOOPS = "{% for a in range(99999) %}" * 2 + "{}" + "{% endfor %}" * 2


def test_endless_output_is_cut():
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        ChatTemplate(LOOPS.replace("{}", "0123456789" * 100)).render(chat("Hi"))
    assert caught.value.what == f"the chat template wrote more than {MAX_RENDERED_CHARACTERS} characters"
    assert time.process_time() - start < 2


def test_output_at_the_limit_passes(monkeypatch):
    monkeypatch.setattr("edgelora.data.template.MAX_RENDERED_CHARACTERS", 40)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert len(template.render(chat("x" * 20)).text) == 20
    with pytest.raises(DataError, match="more than 40 characters"):
        template.render(chat("x" * 41))
