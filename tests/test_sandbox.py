"""What a chat template from a stranger cannot do: reach Python, run on, or fill the memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edgelora.data.conversation import Message
from edgelora.data.rendering.meter import MAX_STEPS
from edgelora.data.rendering.tracked import MAX_CHARACTERS
from edgelora.data.template import MAX_SOURCE_CHARACTERS, ChatTemplate
from edgelora.errors import DataError

HI = [Message("user", "Hi")]
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}[{{ m.content }}]{% endfor %}"
)


def test_roles_that_a_template_refuses():
    with pytest.raises(DataError) as caught:
        ChatTemplate(STRICT).render([Message("assistant", "Hi")])
    assert caught.value.what == "the chat template refused a conversation: roles must alternate user/assistant"
    assert caught.value.fix.startswith("check the order of roles")
    assert ChatTemplate(STRICT).render([*HI, Message("assistant", "b")]).text == "[Hi][b]"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ }}",
        "{{ 'x' | no_such_filter }}",
        "{{ 'x' | attr('__class__') }}",
        "{{ [1] | random }}",
        "{% no_such_tag %}",
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{% block x %}{% endblock %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30,
        "{{ " + "1" * 5000 + " }}",
        "x" * (MAX_SOURCE_CHARACTERS + 1),
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
        "{{ '%d' | format('a') }}",
        "{{ '{5}'.format(1) }}",
        "{{ '{a}'.format(1) }}",
        "{{ messages[0].content.format(1) }}",
        "{{ 'a'.encode('utf-8') }}",
        "{{ [].pop() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='assistant') }}",
        "{{ range(10 ** 9) | list }}",
        "{{ namespace() }}",
        "{{ range }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ cycler(1) }}",
        "{{ joiner() }}",
    ],
)
def test_a_template_that_fails(source):
    with pytest.raises(DataError, match="refused a conversation"):
        ChatTemplate(source).render(HI)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages[0].content.origin.x }}",
        "{{ messages[0].get.__self__.x }}",
        "{{ messages | map(attribute='__class__.__mro__') | list }}",
        "{{ (1).to_bytes(10, 'big') }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'__class__': 1}) }}",
        "{% for a in [1] %}{{ loop._iterable.x }}{% endfor %}",
        "{{ self._TemplateReference__context.environment.x }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(DataError, match="refused a conversation"):
        ChatTemplate(source).render(HI)


def test_a_message_is_not_changed_by_its_template():
    message = Message("assistant", None, ({"function": {"name": "get", "arguments": {"a": [1]}}},))
    source = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.a | list }}{% endfor %}"
    assert ChatTemplate(source).render([message]).text == "[1]"
    assert message.tool_calls[0] == {"function": {"name": "get", "arguments": {"a": [1]}}}


def test_output_at_the_limit_passes():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    assert len(template.render([Message("user", "x" * (MAX_CHARACTERS // 2))]).text) == MAX_CHARACTERS
    with pytest.raises(DataError) as caught:
        template.render([Message("user", "x" * (MAX_CHARACTERS // 2 + 1))])
    assert caught.value.what == f"the chat template was stopped: it wrote more than {MAX_CHARACTERS} characters"


def test_a_conversation_with_more_characters_than_have_a_number():
    with pytest.raises(DataError, match="a conversation of more than 1114112 characters"):
        ChatTemplate("x").render([Message("user", "x" * 600_000)] * 2)


@pytest.mark.parametrize("loops", [1, 3])
def test_steps_are_counted_the_same_everywhere(loops):
    source = "{% for i in range(" + str(MAX_STEPS // 2 // loops) + ") %}{% endfor %}"
    assert ChatTemplate(source * loops).render(HI).text == ""
    with pytest.raises(DataError) as caught:
        ChatTemplate(source * loops * 3).render(HI)
    assert caught.value.what == f"the chat template was stopped: it takes more than {MAX_STEPS} steps"


def repeated(count: int, iterable: str, body: str) -> str:
    return "".join(f"{{% for a{i} in {iterable} %}}" for i in range(count)) + body + "{% endfor %}" * count


GROW = "{% set ns = namespace(x=START, y=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"
LONG = "{% set s = 'ab' * 950000 %}"
# What a hostile template may try. Each must end in a DataError, within the limits that LIMITED_CHILD sets.
ATTACKS = {
    "nested loops that write": repeated(5, "range(99999)", "0123456789" * 100),
    "nested loops that do nothing": repeated(5, "range(99999)", ""),
    "a loop over a text, nested": "{% set s = 'a' * 100000 %}" + repeated(10, "s", "x"),
    "filtered loops": "{% for i in range(99999) if false %}{% endfor %}" * 500,
    "doubled text": GROW.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
    "doubled text by ~": GROW.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
    "doubled text by replace": GROW.replace("START", "'ab'").replace("STEP", "ns.x.replace('a', ns.x)"),
    "doubled text by join": GROW.replace("START", "'ab'").replace("STEP", "ns.x.join([ns.x, ns.x])"),
    "doubled text by %": GROW.replace("START", "'ab'").replace("STEP", "'%s%s' % (ns.x, ns.x)"),
    "doubled text by JSON": GROW.replace("START", "'ab'").replace("STEP", "[ns.x, ns.x] | tojson"),
    "doubled text by a block": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "a doubled list": GROW.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    "lists within lists": GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x == ns.y }}",
    "dicts within dicts": GROW.replace("START", "1").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
    "dicts by dict()": GROW.replace("START", "1").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "arguments within arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}"
    "{{ varargs | tojson }}{% endif %}{% endmacro %}{{ f(60, 1) }}",
    "squared numbers": GROW.replace("START", "7").replace("STEP", "ns.x * ns.x"),
    "a long list": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [i] %}{% endfor %}",
    "many long lists": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "many long texts": LONG + "{% set ns = namespace(x=[]) %}"
    "{% for i in range(999) %}{% set ns.x = ns.x + [s[i:]] %}{% endfor %}",
    "many slices": LONG + "".join(f"{{% set v{i} = s[1:] %}}" for i in range(3000)),
    "many splits": "{% for i in range(999) %}{% set x = ('a ' * 90000).split() %}{% endfor %}",
    "many upper": LONG + "{% for i in range(99999) %}{% if s.upper() %}{% endif %}{% endfor %}",
    "many questions": LONG + "{% for i in range(99999) %}{% if s.isalpha() %}{% endif %}{% endfor %}",
    "many searches": LONG + "{% set t = 'a' * 400000 + 'b' %}" + "{% if t in s %}{% endif %}" * 8000,
    "many counts": LONG + "{% for i in range(99999) %}{{ s.count('a' * 1000) }}{% endfor %}",
    "many sorts": "{% for i in range(99999) %}{{ range(90000) | list | sort | length }}{% endfor %}",
    "a repeated text": "{{ 'a' * 10 ** 10 }}",
    "a text repeated from the right": "{{ 10 ** 10 * 'a' }}",
    "a repeated list": "{{ [1] * 10 ** 9 }}",
    "a high power": "{{ 10 ** 10 ** 10 }}",
    "a wide number": "{{ '%10000000000d' % 1 }}",
    "a width as an argument": "{{ '%*d' % (10 ** 10, 1) }}",
    "many decimals": "{{ '%.999999999f' % 1 }}",
    "the format filter": "{{ '%9999999999s' | format('a') }}",
    "a wide format": "{{ '{:>9999999999}'.format(1) }}",
    "a nested format": "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10) }}",
    "indent": "{{ ('a\n' * 90000) | indent(1000) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "a long separator": "{{ ('b' * 90000).join(['a'] * 90000) }}",
    "a printed list": "{{ ['a' * 9000] * 90000 }}",
    "characters": LONG + "{{ s | list | length }}",
    "a long date": "{{ strftime_now('%Y' * 10 ** 6) }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a tree of callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 18 + "x" + "{% endcall %}" * 18,
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a wide recursive loop": "{% for x in [0] recursive %}{{ loop(range(99999)) if loop.depth < 9 }}{% endfor %}",
    "a buffer": "{% set x %}{% for i in range(99999) %}{{ 'ab' * 100000 }}{% endfor %}{% endset %}",
    "a buffered constant": "{% macro f() %}{% for i in range(99999) %}" + "x" * 90000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "a long source": "{{ a }}" * 14_000 + "{{ 1 / 0 }}",
    "a long list in the source": "{{ [" + "1," * 49_000 + "] }}{{ 1 / 0 }}",
    "a long chain": "{{ a" + ".a" * 49_000 + " }}",
    "many macros": "{% macro a() %}{% endmacro %}" * 3200 + "{{ 1 / 0 }}",
}  # fmt: skip

# Each attack in a process of its own with 4 s of processor time (2 s, and room for a slow machine) and 256 MB more
# memory than it starts with. Prints what became of each.
LIMITED_CHILD = """
import json, os, resource, sys
from edgelora.data.conversation import Message
from edgelora.data.template import ChatTemplate
from edgelora.errors import DataError

ChatTemplate("{{ messages }}").render([])
results = {}
for name, source in json.load(sys.stdin).items():
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        with open("/proc/self/statm") as f:
            used = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (4, 4))
        try:
            ChatTemplate(source).render([Message("user", "Hi")])
        except DataError as e:
            os.write(sender, e.what.encode()[:500])
        except BaseException as e:
            os.write(sender, ("untyped: " + repr(e)).encode()[:500])
        os._exit(0)
    os.close(sender)
    status = os.waitpid(child, 0)[1]
    said = os.read(receiver, 1000).decode()
    results[name] = f"killed: {status}" if status else said or "it rendered"
    os.close(receiver)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def ended() -> dict[str, str]:
    """How each attack ended."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of memory are set as Linux has them")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED_CHILD], input=json.dumps(ATTACKS), capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_ends_in_a_typed_error(ended, attack):
    assert ended[attack].startswith("the chat template "), ended[attack]
    assert "Memory" not in ended[attack]
