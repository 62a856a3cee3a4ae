"""A JSON schema → a grammar (GBNF) all of whose texts fit the schema.

Not every fitting text is in it: properties come in the schema's order, none beside those it names, strings and numbers
are written plainly. What a grammar cannot hold to (patterns, number ranges, `not` …) is refused, never left out.
llama-cpp-python's own converter leaves out what it does not know, and lets raw line ends into strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from edgelora.errors import ConfigError
from runtime.gbnf import MAX_REPEAT
from runtime.json_rules import FORMATS, RULES

MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_CHOICES = 500  # of one enum
MAX_PROPERTIES = 200  # of one object: llama.cpp recurses through those that may be left out

ANNOTATIONS = {
    "$comment", "$schema", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly",
}  # fmt: skip
# what is understood of each type
KEYWORDS: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "number": set(),
    "integer": set(),
    "boolean": set(),
    "null": set(),
}
Schema = Mapping[str, Any]
_NAME = re.compile(r"[A-Za-z0-9-]+")


def gbnf_of_schema(schema: Schema) -> str:
    """Raises ConfigError, with the place in the schema, for what is not supported or beyond the limits."""
    _check_size(schema)
    return _Writer(schema).write()


def _refused(where: str, what: str, why: str, fix: str = "leave it out, and check the answer yourself") -> ConfigError:
    return ConfigError(what=f"the JSON schema: {what} (at {where})", why=why, fix=fix)


def _check_size(schema: object) -> None:
    n_nodes, todo = 0, [(schema, 0)]
    while todo:
        node, depth = todo.pop()
        n_nodes += 1
        if depth > MAX_DEPTH or n_nodes > MAX_NODES:
            raise _refused(
                "#", f"more than {MAX_DEPTH} levels or {MAX_NODES:,} parts", "its grammar would be very large",
                "ask for a smaller form",
            )  # fmt: skip
        below = list(node.values()) if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
        todo += [(part, depth + 1) for part in below]


def _literal(value: object, where: str) -> str:
    """The GBNF of a value's one JSON text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as e:
        raise _refused(where, f"{value!r} as a value", "it has no JSON text", "use a JSON value") from e
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


class _Writer:
    """The rules of one schema. A method returns an expression; what may recur has a rule of its own."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._rules: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._unwritten: list[tuple[str, str, object]] = []  # referred to: name of the rule, place, schema

    def write(self) -> str:
        self._rules["root"] = self.value(self._root, "#")
        while self._unwritten:
            name, where, schema = self._unwritten.pop()
            self._rules[name] = self.value(schema, where)
        todo = list(self._rules.values())
        while todo:
            for name in set(_NAME.findall(todo.pop())) & RULES.keys() - self._rules.keys():
                self._rules[name] = RULES[name]
                todo.append(RULES[name])
        return "\n".join(f"{name} ::= {rule}" for name, rule in self._rules.items())

    def _rule(self, expression: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules[name] = expression
        return name

    def value(self, schema: object, where: str) -> str:
        if schema is True:
            return "value"
        if not isinstance(schema, Mapping):
            raise _refused(where, f"{schema!r}", "nothing fits it, or it is no schema", "use a JSON object")
        keys = set(schema) - ANNOTATIONS
        if "$ref" in keys:
            self._alone(keys, {"$ref"}, where)
            return self._reference(schema["$ref"], where)
        for union in ("anyOf", "oneOf"):
            if union in keys:
                self._alone(keys, {union}, where)
                return self._union(schema[union], f"{where}/{union}", exclusive=union == "oneOf")
        if keys & {"const", "enum"}:
            self._alone(keys, {"const", "enum", "type"}, where)
            return self._choice(schema, where)
        return self._typed(schema, keys, where)

    def _alone(self, keys: set[str], known: set[str], where: str) -> None:
        if unknown := sorted(keys - known):
            raise _refused(where, f"{', '.join(unknown)}", f"not supported beside {', '.join(sorted(known & keys))}")

    def _typed(self, schema: Schema, keys: set[str], where: str) -> str:
        types = _types(schema, where)
        if not types:  # what its keywords are about, or anything
            types = [t for t, known in KEYWORDS.items() if keys & known] or ["value"]
        known = {"type"}.union(*(KEYWORDS.get(t, set()) for t in types))
        if unknown := sorted(keys - known):
            raise _refused(where, ", ".join(unknown), f"a grammar of {' or '.join(types)} does not hold to it")
        return _either([self._of_type(t, schema, where) for t in types])

    def _of_type(self, name: str, schema: Schema, where: str) -> str:
        if name == "object":
            return self._object(schema, where)
        if name == "array":
            return self._array(schema, where)
        if name == "string":
            return self._string(schema, where)
        return name

    def _reference(self, target: object, where: str) -> str:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise _refused(where, f"$ref {target!r}", "only places in the same schema are known", "copy it to $defs")
        if target not in self._references:
            node: Any = self._root
            for part in target.split("/")[1:]:
                key = unquote(part).replace("~1", "/").replace("~0", "~")
                if not isinstance(node, Mapping) or key not in node:
                    raise _refused(where, f"$ref {target!r}", "there is no such place", "define it under $defs")
                node = node[key]
            self._references[target] = self._rule("")
            self._unwritten.append((self._references[target], target, node))  # later: it may contain itself
        return self._references[target]

    def _union(self, schemas: object, where: str, exclusive: bool) -> str:
        if not isinstance(schemas, list | tuple) or not 0 < len(schemas) <= MAX_CHOICES:
            raise _refused(where, "no list of schemas", f"it must hold 1 to {MAX_CHOICES}", "list them")
        if exclusive and any(_overlap(a, b, where) for a, b in combinations(schemas, 2)):
            raise _refused(where, "alternatives of a oneOf", "more than one could fit the same value", "use anyOf")
        return _either([self.value(s, f"{where}/{i}") for i, s in enumerate(schemas)])

    def _choice(self, schema: Schema, where: str) -> str:
        values, types = _listed(schema, where), _types(schema, where)
        fitting = [v for v in values if not types or set(types) & _types_of(v)]
        if not fitting:
            raise _refused(where, f"no value of type {types}", "nothing would fit", "correct the type")
        return _either(list(dict.fromkeys(_literal(v, where) for v in fitting)))

    def _string(self, schema: Schema, where: str) -> str:
        if "format" in schema:
            form = schema["format"]
            if form not in FORMATS or "minLength" in schema or "maxLength" in schema:
                raise _refused(where, f"format {form!r}", f"known are {', '.join(FORMATS)}, without lengths")
            return rf'"\"" {form} "\""'
        low, high = _bounds(schema, "minLength", "maxLength", where)
        return "string" if (low, high) == (0, None) else rf'"\"" char{_times(low, high)} "\""'

    def _array(self, schema: Schema, where: str) -> str:
        low, high = _bounds(schema, "minItems", "maxItems", where)
        item = self.value(schema.get("items", True), f"{where}/items")
        if high == 0:
            return '"[" ws "]"'
        item = self._rule(item)
        more = self._rule(f'"," ws {item}')
        items = f"{item} {more}{_times(max(low - 1, 0), None if high is None else high - 1)} ws"
        return self._rule(f'"[" ws {items} "]"' if low else f'"[" ws ({items})? "]"')

    def _object(self, schema: Schema, where: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, Mapping) or len(properties) > MAX_PROPERTIES:
            raise _refused(where, "properties", f"they must be an object of at most {MAX_PROPERTIES}", "list fewer")
        if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
            raise _refused(where, "required", "it must be a list of names", "list the names")
        if strange := [name for name in required if name not in properties]:
            raise _refused(where, f"required {', '.join(strange)}", "no such property is described", "describe it")
        if properties:
            if not isinstance(others, bool):
                raise _refused(where, "additionalProperties beside properties", "a name could come twice", "set false")
            return self._named(properties, set(required), where)
        if others is False:
            return '"{" ws "}"'
        value = self._rule(self.value(others, f"{where}/additionalProperties"))
        return self._rule(rf'"{{" ws (string ":" ws {value} ("," ws string ":" ws {value})* ws)? "}}"')

    def _named(self, properties: Schema, required: set[str], where: str) -> str:
        """The properties in their order, those not required perhaps left out."""
        rest = "ws"  # what may come behind a property, written from the last one on
        begins: list[str] = []
        for name, schema in reversed(list(properties.items())):
            if not isinstance(name, str):
                raise _refused(where, f"the property {name!r}", "a name is a text", "use a text")
            pair = f'{_literal(name, where)} ":" ws {self.value(schema, f"{where}/properties/{name}")}'
            pair = self._rule(pair)
            begins = [f"{pair} {rest}"] if name in required else [f"{pair} {rest}", *begins]
            rest = self._rule(f'"," ws {pair} {rest}' if name in required else f'("," ws {pair})? {rest}')
        inside = _either(begins) if required else f"({_either(begins)})?"
        return self._rule(f'"{{" ws {inside} "}}"')


def _either(expressions: list[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({' | '.join(expressions)})"


def _types(schema: Schema, where: str) -> list[str]:
    given = schema.get("type", [])
    types = [given] if isinstance(given, str) else given
    if not isinstance(types, list | tuple) or not all(isinstance(t, str) and t in KEYWORDS for t in types):
        raise _refused(where, f"type {given!r}", f"known are {', '.join(KEYWORDS)}", "use those")
    return list(dict.fromkeys(types))


def _types_of(value: object) -> set[str]:
    """The types that a value is of: 1 is an integer and a number."""
    if value is None or isinstance(value, bool):
        return {"null"} if value is None else {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    return {"string"} if isinstance(value, str) else {"object"} if isinstance(value, Mapping) else {"array"}


def _listed(schema: Schema, where: str) -> list[Any]:
    """The values of an enum or a const."""
    if "const" in schema and "enum" in schema:
        raise _refused(where, "const and enum", "one of them decides", "leave one out")
    values = [schema["const"]] if "const" in schema else schema["enum"]
    if not isinstance(values, list | tuple) or not 0 < len(values) <= MAX_CHOICES:
        raise _refused(where, "an enum", f"it must list 1 to {MAX_CHOICES} values", "list them")
    return list(values)


def _overlap(one: object, other: object, where: str) -> bool:
    """Whether a value could fit both, as far as types and listed values tell."""
    (types, values), (other_types, other_values) = _extent(one, where), _extent(other, where)
    return bool(values & other_values if values and other_values else types & other_types)


def _extent(schema: object, where: str) -> tuple[set[str], set[str]]:
    """Which types fit a schema, and their JSON texts if it lists its values; every type if it does not say."""
    if isinstance(schema, Mapping) and set(schema) & {"const", "enum"}:
        values = _listed(schema, where)
        plain = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
        return set().union(*map(_types_of, values)), {_literal(v, where) for v in plain}
    types = _types(schema, where) if isinstance(schema, Mapping) else []
    return set(types or KEYWORDS) | ({"number"} if "integer" in types else set()), set()


def _bounds(schema: Schema, low: str, high: str, where: str) -> tuple[int, int | None]:
    least, most = schema.get(low, 0), schema.get(high)
    for name, value in ((low, least), (high, 0 if most is None else most)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEAT:
            raise _refused(where, f"{name} {value!r}", f"a grammar can count from 0 to {MAX_REPEAT:,}")
    if most is not None and most < least:
        raise _refused(where, f"{low} {least} above {high} {most}", "nothing would fit", "turn the two around")
    return least, most


def _times(low: int, high: int | None) -> str:
    return f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}"
