"""Grammars and JSON schemas: texts under them fit them, and none that llama.cpp dies of reaches it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.sampling as sampling_module
from edgelora.errors import ConfigError, EngineError
from runtime.binding import GrammarSampler, Model
from runtime.gbnf import MAX_DEPTH, MAX_REPEAT, Characters, parse_gbnf
from runtime.grammar import _Machine, check_gbnf, grammar_of
from runtime.json_schema import gbnf_of_schema
from runtime.sampling import Sampler
from runtime.service import Sampling


@pytest.fixture(scope="module")
def model(tiny):
    model = Model(tiny.path)
    yield model
    model.close()


def reads(gbnf: str, text: str) -> bool:
    """Whether `text` is one of the grammar's, by the automaton that the check itself runs on."""
    grammar = parse_gbnf(gbnf)
    machine = _Machine(grammar)
    stacks = machine.begin(grammar.names["root"])
    for character in text:
        stacks = machine.step(stacks, ord(character))
    return 0 in stacks


def generated(model, sampling, seed, n=200):
    """The text of random logits under a grammar, ended by the model's own end token or after `n` tokens."""
    draw = np.random.default_rng(seed)
    sampler, text = Sampler.of(model, sampling, n_ctx=256), b""
    for _ in range(n):
        token = sampler.pick(draw.normal(0, 3, model.n_vocab).astype(np.float32))
        if model.ends_generation(token):
            sampler.close()
            return text.decode()
        sampler.accept(token)
        text += model.piece(token)
    sampler.close()
    return None


# Regular grammars beside the regular expression of the same texts: Python's `re` is the oracle.
REGULAR = {
    r'root ::= [a-c]+ "-" [0-9]{2,4}': r"[a-c]+-[0-9]{2,4}",
    r'root ::= ("yes" | "no" | "") "!"?': r"(yes|no|)!?",
    'root ::= word (" " word){1,3}\nword ::= [^ \\x00-\\x1f]{3} # a word': r"[^ \x00-\x1f]{3}( [^ \x00-\x1f]{3}){1,3}",
    r'root ::= "\"" [A-Z\]\-]{0,5} "\u00e4" . "\""': r'"[A-Z\]\-]{0,5}ä[\s\S]"',
}  # fmt: skip


@pytest.mark.parametrize("gbnf", REGULAR)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_generated_fits_the_grammar(model, gbnf, temperature):
    texts = [generated(model, Sampling(temperature=temperature, grammar=gbnf, seed=s), seed=s) for s in range(8)]
    whole = [text for text in texts if text is not None]
    assert len(set(whole)) > 1
    assert [text for text in whole if not re.fullmatch(REGULAR[gbnf], text)] == []


@pytest.mark.parametrize("gbnf", REGULAR)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_our_reading_of_a_grammar_is_that_of_its_regular_expression(gbnf, data):
    pattern = REGULAR[gbnf]
    texts = st.from_regex(pattern, fullmatch=True) | st.text(alphabet='abc-0129 yesno!"Äz]', max_size=8)
    text = data.draw(texts)
    assert reads(gbnf, text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("gbnf", REGULAR)
def test_our_automaton_allows_what_llama_cpp_allows(model, gbnf):
    """The stacks that the limits are counted on: after any prefix, the same tokens may come."""
    grammar = parse_gbnf(gbnf)
    machine, sampler, draw = _Machine(grammar), GrammarSampler(model, gbnf), random.Random(0)
    stacks = machine.begin(grammar.names["root"])
    pieces = {t: p.decode() for t in range(model.n_vocab) if (p := model.piece(t)).isascii() and p}
    for _ in range(6):
        ours = {}
        for token, piece in pieces.items():
            after = stacks
            for character in piece:
                after = machine.step(after, ord(character))
            if after:
                ours[token] = after
        assert {t for t in pieces if sampler.allows(t)} == set(ours)
        if not ours:
            break
        token = draw.choice(sorted(ours))
        sampler.accept(token)
        stacks = ours[token]
    sampler.close()


@pytest.mark.parametrize("first", [4, 512])
def test_greedy_under_a_grammar_is_the_likeliest_token_that_fits(model, monkeypatch, first):
    """Also where the few that are looked at first hold none."""
    monkeypatch.setattr(sampling_module, "LOOKED_AT_FIRST", first)
    gbnf, draw = 'root ::= [a-z "]{1,40}', np.random.default_rng(0)
    sampler, oracle = Sampler.of(model, Sampling(grammar=gbnf), n_ctx=64), GrammarSampler(model, gbnf)
    for _ in range(12):
        row = draw.normal(0, 3, model.n_vocab).astype(np.float32)
        fitting = [token for token in range(model.n_vocab) if oracle.allows(token)]
        token = sampler.pick(row)
        assert token == max(fitting, key=lambda t: row[t])
        if model.ends_generation(token):
            break
        sampler.accept(token)
        oracle.accept(token)
    sampler.close()
    oracle.close()


def test_llama_cpps_own_grammars_pass():
    # the forms of its grammars/ folder: recursion, repetition, optional space, comments; alternatives that begin alike
    check_gbnf(
        'root ::= expr\nexpr ::= term ("+" term)*\nterm ::= name | call | "-" term | "(" expr ")"\n'
        'call ::= name "(" (expr ("," expr)*)? ")"\nname ::= [a-z] [a-z0-9]*'
    )
    check_gbnf(
        'root ::= (expr "=" ws term "\\n")+\nexpr ::= term ([-+*/] term)*\nterm ::= ident | num | "(" ws expr ")" ws\n'
        "ident ::= [a-z] [a-z0-9_]* ws\nnum ::= [0-9]+ ws # digits\nws ::= [ \\t\\n]*"
    )
    for schema in ({}, TREE, {"type": "array", "maxItems": MAX_REPEAT}):
        check_gbnf(gbnf_of_schema(schema))


FAR_AWAY = "\n".join(f'r{i} ::= "a" r{i + 1} "x" | "a" r{i + 1} "y"' for i in range(30)) + '\nr30 ::= "z"'
# what it is → what the error names
HOSTILE = {
    "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000: f"parentheses {MAX_DEPTH + 1} deep",
    "root ::= " + "(" * 20_000: "deep",
    'root ::= "a"{0,100000}': "100,000 repetitions",
    'root ::= "a"{5,2}': "{5,2}",
    "root ::= ((([a-z]{0,100}){0,100}){0,100}){0,100}": "repetitions of one part",
    'root ::= "' + "a" * 60_000 + '"{2000}': "elements",
    "root ::= [a-z]" * 20_000: "bytes",
    "": "no rule is named root",
    'a ::= "x"': "no rule is named root",
    "root ::= missing": "undefined: missing",
    'root ::= "x"\nroot ::= "y"': "defined twice",
    'root ::= root "x" | "y"': "root begins with itself",
    'root ::= a\na ::= b? a "x" | "y"\nb ::= "b"': "a begins with itself",
    'root ::= e root "x" | "y"\ne ::= f\nf ::= ""': "root begins with itself",
    'root ::= ("a"?)*': "begins with itself",
    'root ::= expr\nexpr ::= term "+" expr | term\nterm ::= "(" expr ")" | [0-9]+': "too many ways",
    'root ::= ([a-z]+ " "?)+ "!"': "too many ways",
    "root ::= " + "[a-z]* " * 4 + '"!"': "too many ways",
    f'root ::= "{"q" * 60}" r0\n{FAR_AWAY}': "too many ways",
    "root ::= r0\n" + FAR_AWAY.replace('"a" ', ""): "the beginning of r20",
    # found by random grammars: llama.cpp runs for ever
    'root ::= x{0,200} ","\nx ::= "f" y | ""\ny ::= x "a" | ""': "too many ways",
    'root ::= x{300} [ab]\nx ::= . | ""': "too many ways",
    "root ::= " + "x? " * 600 + '\nx ::= "a"?': "too many ways",
    'root ::= "a': "line 1: expected a character",
    'root ::= "a"\nb = "c"': "line 2: expected ::=",
    "root ::= *": "nothing stands before",
    'root ::= ""*': "nothing stands before",
    "root ::= []": "a class of no characters",
    r'root ::= "\q"': "expected a character",
    r'root ::= "\U00110000"': "no character has this code",
    'root ::= "\0"': "code 0",
    'root ::= "\ud800"': "surrogate",
    "root ::= ) x": "expected the end of a rule",
    'root ::= ("a"': "expected )",
    "root ::= <[99999999999]>": "expected <token>",
    'root ::= "a"{x}': "expected {m}",
}  # fmt: skip


@pytest.mark.parametrize("gbnf", HOSTILE, ids=range(len(HOSTILE)))
def test_what_llama_cpp_would_not_survive_is_refused(gbnf):
    with pytest.raises(ConfigError) as e:
        grammar_of(Sampling(grammar=gbnf))
    assert HOSTILE[gbnf] in e.value.what


def test_as_much_as_is_allowed_still_runs(model):
    gbnf = "root ::= " + "(" * MAX_DEPTH + f"[a-z]{{0,{MAX_REPEAT // 100}}}" + ")" * MAX_DEPTH
    assert generated(model, Sampling(temperature=1, grammar=gbnf), 0) is not None
    gbnf = f'root ::= "{"ab" * 9000}" [a-z]{{{MAX_REPEAT}}}'
    assert generated(model, Sampling(temperature=1, grammar=gbnf), 0, n=3) is None


def test_tokens_may_stand_in_a_grammar(model):
    sampler = Sampler.of(model, Sampling(grammar="root ::= <[7]> !<[8]>"), n_ctx=64)
    rows = np.zeros((2, model.n_vocab), np.float32)
    rows[:, 8] = 5
    found = []
    for row in rows:
        found.append(sampler.pick(row))
        sampler.accept(found[-1])
    assert found[0] == 7
    assert found[1] != 8
    with pytest.raises(EngineError, match="cannot read the grammar"):
        Sampler.of(model, Sampling(grammar="root ::= <no such token>"), n_ctx=64)


def test_a_token_that_does_not_fit_raises_and_the_process_lives(model):
    sampler = Sampler.of(model, Sampling(grammar='root ::= "no"'), n_ctx=64)
    end = next(t for t in range(model.n_vocab) if model.ends_generation(t))
    for token in (end, *model.tokenize("yes", parse_special=False)[:1]):
        with pytest.raises(EngineError, match="does not fit the grammar"):
            sampler.accept(token)


def test_a_grammar_that_nothing_fits_raises(model):
    sampler = Sampler.of(model, Sampling(grammar=r"root ::= [^\x00-\U0010FFFF]"), n_ctx=64)
    with pytest.raises(EngineError, match="no token fits"):
        sampler.pick(np.zeros(model.n_vocab, np.float32))


def random_grammar(draw):
    """A few rules of literals, classes, groups and repetitions that refer to one another, most of them hostile."""
    names = ["root", *(f"n{i}" for i in range(draw.randint(1, 4)))]

    def part(depth, later, first):
        kind = draw.random()
        if kind < 0.3:
            return '"' + "".join(draw.choice(["a", "b", "(", " ", "{", ",", r"\\", r"\""]) for _ in range(3)) + '"'
        if kind < 0.5:
            return draw.choice(["[a-z]", '[^"]', "[ab]", "[^ab]", ".", "[0-9]", r"[ \t\n]"])
        if kind < 0.75 or not depth:
            return f'"{draw.choice("cdefgh")}" ' * first + draw.choice(later)
        return f"({ways(depth - 1, later)})"

    def ways(depth, later):
        counts = [draw.randint(1, 3) for _ in range(draw.choice([1, 1, 2, 3]))]
        return " | ".join(
            " ".join(part(depth, later, i == 0) + draw.choice(["", "", "", *REPEATS]) for i in range(n)) for n in counts
        )

    return "\n".join(f"{name} ::= {ways(2, names[i + 1 :] or names)}" for i, name in enumerate(names))


REPEATS = ["*", "+", "?", "{2}", "{0,3}", "{1,}", "{2,5}", "{0,40}"]


def run_random_grammars(path, first, last):
    """What the child of the next test does: how many grammars passed the check and ran for 8 long tokens."""
    model, ran = Model(Path(path)), 0
    lengths = np.array([len(model.piece(token)) for token in range(model.n_vocab)], np.float32)
    for seed in range(int(first), int(last)):
        draw, noise = random.Random(seed), np.random.default_rng(seed)
        gbnf = random_grammar(draw)
        try:
            sampler = Sampler.of(model, Sampling(grammar=gbnf), n_ctx=64)
        except ConfigError:
            continue
        ran += 1
        for _ in range(8):
            try:
                token = sampler.pick(lengths + np.float32(3 * draw.random()) * noise.random(model.n_vocab, np.float32))
            except EngineError:  # nothing fits
                break
            if model.ends_generation(token):
                break
            sampler.accept(token)
        sampler.close()
    print(json.dumps({"ran": ran}))


def test_no_grammar_within_the_limits_ends_the_process(tiny):
    """Random grammars through the check, and those that pass through llama.cpp, in a child that may die of them."""
    here = Path(__file__).parent
    code = "import sys, test_grammar; test_grammar.run_random_grammars(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny.path), "0", "60"], cwd=here, capture_output=True,
        text=True, timeout=100, check=False, env={**os.environ, "PYTHONPATH": str(here.parent)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ran"] > 5


# -- JSON schemas -----------------------------------------------------------------------------------------------------

PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Person", "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer"},
        "mail": {"type": ["string", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b\\c", 'd"e', "ä\n", 1, None, True]}, "maxItems": 3},
    },
    "required": ["age"], "additionalProperties": False,
}  # fmt: skip
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "number"}, "below": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["value"],
        }
    },
}
# schema → values that its grammar must hold, and some that it must not
SCHEMAS = [
    (PERSON, [{"age": 3}, {"name": "Ann", "age": -1, "mail": None, "tags": ["b\\c", 'd"e', "ä\n"]}],
     [{}, {"age": 1.5}, {"name": "", "age": 1}, {"name": "x" * 9, "age": 1}, {"age": 1, "more": 1}, {"age": "1"},
      {"age": 1, "tags": ["a"] * 4}, {"age": 1, "tags": ["b\x08c"]}]),
    (TREE, [{"value": 1}, {"value": 1.5e3, "below": [{"value": 0, "below": []}, {"value": -2}]}],
     [{"below": []}, {"value": 1, "below": [{}]}]),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}, "minItems": 2}]},
     [5, [True, False], [True] * 5], [[True], "x", 1.5]),
    ({"oneOf": [{"type": "string", "format": "date"}, {"const": {"a": [1]}}]}, ["2024-02-28", {"a": [1]}],
     ["2024-02-31", "2024-13-01", {"a": 1}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1, "y": 2}], [{"x": "1"}, []]),
    ({"type": "object", "properties": {}, "additionalProperties": False}, [{}], [{"a": 1}]),
    ({"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}, "required": ["b"]},
     [{"b": None}, {"a": None, "b": None}, {"b": None, "c": None}], [{}, {"a": None, "c": None}]),
    ({"type": "array", "maxItems": 0}, [[]], [[1]]),
    ({"type": "array", "minItems": 1, "maxItems": 2}, [[1], ["x", {}]], [[], [1, 2, 3]]),
    ({"enum": [1, "1", None], "type": ["string", "null"]}, ["1", None], [1]),
    ({"type": "string", "format": "uuid"}, ["0123abcd-0123-abcd-0123-0123456789ab"], ["0123abcd"]),
    ({"type": "string", "format": "date-time"}, ["2024-12-31T23:59:59.5Z", "2024-01-01T00:00:00+01:00"],
     ["2024-12-31T24:00:00Z"]),
    ({"type": "string", "minLength": 2, "maxLength": 2}, ["ab", "a\n", "😀ü"], ["a", "abc"]),
    ({}, [{"a": [1, "x", None, {"b": True}]}, -1.5, "text", []], []),
    (True, [0], []),
]  # fmt: skip
EACH_SCHEMA = pytest.mark.parametrize("schema", [schema for schema, *_ in SCHEMAS], ids=range(len(SCHEMAS)))


@pytest.mark.parametrize(("schema", "fitting", "others"), SCHEMAS, ids=range(len(SCHEMAS)))
def test_a_schemas_grammar_holds_what_fits_and_nothing_else(schema, fitting, others):
    gbnf = gbnf_of_schema(schema)
    check_gbnf(gbnf)
    assert [
        v for v in fitting if not (fits(v, schema, schema) and reads(gbnf, json.dumps(v, ensure_ascii=False)))
    ] == []
    assert [v for v in others if fits(v, schema, schema) or reads(gbnf, json.dumps(v, ensure_ascii=False))] == []


@EACH_SCHEMA
@settings(deadline=None, max_examples=60)
@given(draw=st.randoms(use_true_random=False))
def test_every_text_of_a_schemas_grammar_fits_it(schema, draw):
    text = random_text(parse_gbnf(gbnf_of_schema(schema)), draw)
    assert fits(json.loads(text), schema, schema), text


@EACH_SCHEMA
def test_what_is_generated_fits_the_schema(model, schema):
    sampling = Sampling(temperature=1, json_schema=schema)
    texts = [generated(model, sampling, seed) for seed in range(4)]
    assert [t for t in texts if t is not None and not fits(json.loads(t), schema, schema)] == []
    assert any(texts)


# what is asked → what the error names
UNSUPPORTED = {
    '{"type": "string", "pattern": "^a+$"}': "pattern (at #)",
    '{"type": "string", "maxLength": 100000}': "maxLength 100000",
    '{"type": "string", "minLength": -1}': "minLength -1",
    '{"type": "string", "minLength": 3, "maxLength": 2}': "minLength 3 above maxLength 2",
    '{"type": "string", "format": "email"}': "format 'email'",
    '{"type": "array", "maxItems": 2001}': "maxItems 2001",
    '{"type": "array", "minItems": true}': "minItems True",
    '{"type": "array", "uniqueItems": true}': "uniqueItems (at #)",
    '{"type": "array", "prefixItems": []}': "prefixItems (at #)",
    '{"type": "integer", "minimum": 3}': "minimum (at #)",
    '{"type": "object", "properties": {"a": {"type": "number", "multipleOf": 2}}}': "multipleOf (at #/properties/a)",
    '{"not": {}}': "not (at #)",
    '{"allOf": [{}]}': "allOf (at #)",
    '{"type": "text"}': "type 'text'",
    '{"type": "object", "patternProperties": {}}': "patternProperties (at #)",
    '{"type": "object", "required": ["a"]}': "required a",
    '{"type": "object", "required": "a"}': "required (at #)",
    '{"type": "object", "properties": {"a": {}}, "additionalProperties": {}}': "beside properties",
    '{"$ref": "https://example.org/s"}': "$ref 'https://example.org/s'",
    '{"$ref": "#/$defs/none"}': "$ref '#/$defs/none'",
    '{"$ref": "#"}': "begins with itself",
    '{"anyOf": [{"$ref": "#"}, {"type": "null"}]}': "begins with itself",
    '{"$ref": "#/$defs/a", "minLength": 2}': "minLength (at #)",
    '{"anyOf": []}': "no list of schemas (at #/anyOf)",
    '{"oneOf": [{"type": "integer"}, {"type": "number"}]}': "alternatives of a oneOf (at #/oneOf)",
    '{"oneOf": [{"type": "string"}, {"const": "a"}]}': "alternatives of a oneOf",
    '{"oneOf": [{"const": 1}, {"const": 1.0}]}': "alternatives of a oneOf",
    '{"enum": []}': "an enum (at #)",
    '{"enum": 5}': "an enum (at #)",
    '{"const": 1, "enum": [1]}': "const and enum",
    '{"enum": [1], "type": "string"}': "no value of type",
    '{"const": NaN}': "nan as a value",
    '{"const": "\\ud800"}': "as a value",
    "false": "False (at #)",
    "[]": "[] (at #)",
    json.dumps({"enum": list(range(501))}): "an enum",
    json.dumps({"properties": {str(i): {} for i in range(501)}}): "properties",
    "[" * 100 + "]" * 100: "levels",
    json.dumps({"enum": [[0] * 20_000]}): "parts",
}


@pytest.mark.parametrize("text", UNSUPPORTED, ids=range(len(UNSUPPORTED)))
def test_what_a_grammar_cannot_hold_to_is_refused(text):
    with pytest.raises(ConfigError) as e:
        grammar_of(Sampling(json_schema=json.loads(text)))
    assert UNSUPPORTED[text] in e.value.what


def operation(*, named):
    """A tree of numbers and operations; unless their first property names them, they begin alike."""

    def node(kind, *names):
        known = {"op": {"const": kind}} if named else {}
        known |= {name: {"$ref": "#/$defs/e"} for name in names}
        return {"type": "object", "properties": known, "required": list(known)}

    return {"$defs": {"e": {"anyOf": [node("+", "a", "b"), node("-", "a"), {"type": "number"}]}}, "$ref": "#/$defs/e"}


def test_forms_that_begin_alike_at_each_depth_are_refused():
    """`{"a":{"a":{"a":` is read in 2, 4, 8 … ways, of which llama.cpp keeps all."""
    check_gbnf(gbnf_of_schema(operation(named=True)))
    with pytest.raises(ConfigError, match="too many ways"):
        check_gbnf(gbnf_of_schema(operation(named=False)))


def test_the_error_names_the_place():
    with pytest.raises(ConfigError) as e:
        gbnf_of_schema({"properties": {"a/b": {"items": {"type": "string", "pattern": "x"}}}})
    assert str(e.value) == (
        "the JSON schema: pattern (at #/properties/a/b/items)\n"
        "  why: a grammar of string does not hold to it\n"
        "  fix: leave it out, and check the answer yourself"
    )


def test_the_limits_of_a_schema_run(model):
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "maxLength": 100} for i in range(100)},
        "required": ["p99"],
    }
    check_gbnf(gbnf_of_schema(schema))
    sampler = Sampler.of(model, Sampling(json_schema=schema), n_ctx=64)
    assert model.piece(sampler.pick(np.zeros(model.n_vocab, np.float32)))[:1] == b"{"


def random_text(grammar, draw):
    """One of the grammar's texts; beyond some length, the shortest way to its end."""
    heights: dict[int, int] = {}
    while len(heights) < len(grammar.rules):  # of the lowest derivation of each rule
        for number, rule in grammar.rules.items():
            if number not in heights and (known := [h for s in rule if (h := height(s, heights)) is not None]):
                heights[number] = 1 + min(known)
    text, todo = "", [grammar.names["root"]]
    while todo:
        element = todo.pop()
        if isinstance(element, Characters):
            text += random_character(element, draw)
        else:
            ways = sorted(grammar.rules[element], key=lambda s: height(s, heights))
            todo += reversed(draw.choice(ways) if len(text) < 60 else ways[0])
    return text


def height(sequence, heights):
    below = [heights.get(e) for e in sequence if isinstance(e, int)]
    return None if None in below else max(below, default=0)


def random_character(element, draw):
    while True:
        low, high = (32, 0x2FF) if element.negated else draw.choice(element.ranges)
        code = draw.randint(low, min(high, low + 2000))
        if element.match(code):
            return chr(code)


KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
FORMATS = {
    "date": date.fromisoformat,
    "uuid": UUID,
    "date-time": lambda text: datetime.fromisoformat(text).astimezone(),
}


def is_of(value, kind):
    if kind in ("number", "integer"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or float(value).is_integer())
    return isinstance(value, KINDS[kind])


def fits(value, schema, root):
    """JSON Schema's own rules, as far as SCHEMAS need them: the oracle."""
    if schema is True:
        return True
    if "$ref" in schema:
        node = root
        for key in schema["$ref"].split("/")[1:]:
            node = node[key]
        return fits(value, node, root)
    kinds = schema.get("type", [])
    listed = [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]
    return (
        (not kinds or any(is_of(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)))
        and (not listed or json.dumps(value) in map(json.dumps, listed))
        and ("anyOf" not in schema or any(fits(value, s, root) for s in schema["anyOf"]))
        and ("oneOf" not in schema or sum(fits(value, s, root) for s in schema["oneOf"]) == 1)
        and fits_inside(value, schema, root)
    )


def fits_inside(value, schema, root):
    if isinstance(value, str):
        if "format" in schema:
            try:
                FORMATS[schema["format"]](value)
            except ValueError:
                return False
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, list):
        counted = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return counted and all(fits(v, schema.get("items", True), root) for v in value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", [])) <= set(value) and all(
            fits(v, known.get(k, others), root) if k in known or others else False for k, v in value.items()
        )
    return True
