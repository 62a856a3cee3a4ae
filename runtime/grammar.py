"""What limits an answer to a form: a grammar that llama.cpp can run to its end, from GBNF or from a JSON schema.

llama.cpp follows every way in which a text could be read (a stack of rules each), by recursion and without limit.
Within a token that it tries, ways that have met again are not joined: in `([a-z]+)+` the work doubles with each
letter. So what begins with itself, forms that can be read in ever more ways, and loops in loops are refused here, the
latter two by trying the texts whose ways grow most.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter

from edgelora.errors import ConfigError
from runtime.gbnf import Characters, Element, Rule, Rules, parse_gbnf, refused
from runtime.json_schema import gbnf_of_schema
from runtime.service import Sampling

MAX_STACKS = 1000  # ways to begin, or to go on: each is tried on every token of the vocabulary
MAX_WAYS = 10_000  # through one character repeated, as long tokens have it: four loops in a row have more
MAX_LEFT = 500  # rules that begin with one another, through which C recurses
MAX_REPEATED = 32  # characters, more than almost any token has
TRIAL_MOVES = 256  # stacks moved on from one text: by several next characters of few stacks, by one of many
TRIAL_STEPS = 100_000  # of all rules, a fraction of a second; of one rule at most an eighth
MAX_KINDS = 64  # of characters told apart
MAX_TRIED = 16  # of them, those that most stacks take

Stacks = frozenset[int]


def grammar_of(sampling: Sampling) -> str | None:
    """The grammar (GBNF) that `sampling` asks for. Raises ConfigError if llama.cpp could not run it."""
    text = sampling.grammar
    if sampling.json_schema is not None:
        text = gbnf_of_schema(sampling.json_schema)
    if text is not None:
        check_gbnf(text)
    return text


@lru_cache(maxsize=64)
def check_gbnf(text: str) -> None:
    """Raises ConfigError if llama.cpp could not read `text` or would not come to an end with it."""
    grammar = parse_gbnf(text)
    undefined = sorted(name for name, rule in grammar.names.items() if rule not in grammar.rules)
    if undefined:
        raise refused(f"undefined: {', '.join(undefined)}", "rules refer to them", "define each rule")
    if "root" not in grammar.names:
        raise refused("no rule is named root", "a text begins there", "name the first rule root")
    order = _left_order(grammar)
    ways = _ways_to_begin(grammar, order)
    _try_out(grammar, sorted(ways, key=lambda rule: (rule != grammar.names["root"], -ways[rule])))


def _leading(sequence: list[Element], empty: Mapping[int, bool]) -> Iterable[Element]:
    """What a sequence may begin with."""
    for element in sequence:
        yield element
        if not (isinstance(element, int) and empty[element]):
            return


def _may_be_empty(rules: Mapping[int, Rule]) -> dict[int, bool]:
    empty = dict.fromkeys(rules, False)
    found = True
    while found:
        found = False
        for number, rule in rules.items():
            if not empty[number] and any(all(isinstance(e, int) and empty[e] for e in s) for s in rule):
                empty[number] = found = True
    return empty


def _left_order(grammar: Rules) -> dict[int, list[Element]]:
    """What each rule may begin with, rules ordered so that those it begins with come before it."""
    empty = _may_be_empty(grammar.rules)
    leading = {n: [e for s in rule for e in _leading(s, empty)] for n, rule in grammar.rules.items()}
    below = {rule: [e for e in elements if isinstance(e, int)] for rule, elements in leading.items()}
    try:
        order = list(TopologicalSorter(below).static_order())
    except CycleError as e:
        raise refused(
            f"{grammar.name(e.args[1][0])} begins with itself", "llama.cpp would never come to an end of it",
            'turn it around: list ::= item ("," item)*',
        ) from e  # fmt: skip
    depth: dict[int, int] = {}
    for rule in order:
        depth[rule] = 1 + max((depth[b] for b in below[rule]), default=0)
        if depth[rule] > MAX_LEFT:
            raise refused(f"more than {MAX_LEFT} rules begin with one another", "llama.cpp recurses through them")
    return {rule: leading[rule] for rule in order}


def _ways_to_begin(grammar: Rules, order: Mapping[int, list[Element]]) -> dict[int, int]:
    ways: dict[int, int] = {}
    for rule, leading in order.items():
        ways[rule] = sum(ways[e] if isinstance(e, int) else 1 for e in leading)
        if ways[rule] > MAX_STACKS:
            raise _too_many(f"the beginning of {grammar.name(rule)}")
    return ways


def _too_many(what: str) -> ConfigError:
    return refused(
        f"{what}: too many ways to read it", "llama.cpp follows each to its end, which takes it very long",
        'let no two read the same text: [a-z]+, not ([a-z]+)+; term ("+" term)*, not term "+" sum | term',
    )  # fmt: skip


class _TooMany(Exception):
    """More ways than llama.cpp should follow."""


class _Machine:
    """llama.cpp's automaton. A stack is a number; 0 is the empty one, at the end of what was begun with."""

    def __init__(self, grammar: Rules) -> None:
        self._elements: list[Element | None] = []
        self._starts: dict[int, list[int]] = {}
        for number, rule in grammar.rules.items():
            self._starts[number] = []
            for sequence in rule:
                self._starts[number].append(len(self._elements))
                self._elements += [*sequence, None]
        self._stacks: list[tuple[int, int]] = [(-1, -1)]
        self._known: dict[tuple[int, int], int] = {}
        self._advanced: dict[int, set[int]] = {}
        self._ways: dict[tuple[int, int], int] = {}
        self.steps = 0

    def _push(self, place: int, stack: int) -> int:
        if self._elements[place] is None:
            return stack
        key = place, stack
        if key not in self._known:
            self._known[key] = len(self._stacks)
            self._stacks.append(key)
        return self._known[key]

    def begin(self, rule: int) -> Stacks:
        return frozenset(s for place in self._starts[rule] for s in self._advance(self._push(place, 0)))

    def _advance(self, stack: int) -> set[int]:
        """Replace rules by what they begin with, until every stack waits for a character."""
        if stack in self._advanced:
            return self._advanced[stack]
        todo, seen, found = [stack], set[int](), set[int]()
        while todo:
            top = todo.pop()
            if top in seen:
                continue
            seen.add(top)
            if len(seen) > 4 * MAX_STACKS or self.steps > 1.5 * TRIAL_STEPS:
                raise _TooMany
            place, below = self._stacks[top]
            element = self._elements[place] if top else None
            if isinstance(element, int):
                rest = self._push(place + 1, below)
                todo += [self._push(start, rest) for start in self._starts[element]]
            else:
                found.add(top)
        self.steps += len(seen)
        self._advanced[stack] = found
        return found

    def entered_twice(self, stacks: Stacks, rule: int) -> bool:
        """Whether the rule has begun anew above different remainders: the same text again doubles them, for ever."""
        remainders: set[int | None] | None = None
        for beginning in self.begin(rule) - {0}:  # each of them stands above each remainder
            found = {self._below(stack, beginning) for stack in stacks} - {None}
            remainders = found if remainders is None else remainders & found
            if len(remainders) < 2:
                return False
        return remainders is not None

    def _below(self, stack: int, beginning: int) -> int | None:
        """What lies below `beginning` in a stack; None if the stack does not begin so."""
        while beginning:
            if not stack or self._stacks[stack][0] != self._stacks[beginning][0]:
                return None
            stack, beginning = self._stacks[stack][1], self._stacks[beginning][1]
        return stack

    def step(self, stacks: Stacks, character: int) -> Stacks:
        """What `stacks` become behind a character, those that are alike joined."""
        return frozenset(after for stack in stacks for after in self._after(stack, character))

    def _after(self, stack: int, character: int) -> Iterable[int]:
        place, below = self._stacks[stack]
        self.steps += 1
        return self._advance(self._push(place + 1, below)) if self._takes(place, character) else ()

    def repeat(self, stacks: Stacks, character: int) -> None:
        """Read a character again and again as llama.cpp reads a token, joining no ways: raises _TooMany."""
        alike: dict[int, list[int]] = {}
        for stack in stacks:
            if self._takes(place := self._stacks[stack][0], character):
                alike.setdefault(place, []).append(stack)
        # of those that wait at one place, the oldest and the newest speak for all
        most = (max(self._ways_of(s, character) for s in (min(a), max(a))) * len(a) for a in alike.values())
        if sum(most) > MAX_WAYS:
            raise _TooMany

    def _ways_of(self, stack: int, character: int) -> int:
        if (stack, character) not in self._ways:
            now, most = {stack: 1}, 0
            for _ in range(MAX_REPEATED):
                following: Counter[int] = Counter()
                for s, ways in now.items():
                    for after in self._after(s, character):
                        following[after] += ways
                now, most = following, max(most, following.total())
                if most > MAX_WAYS or len(now) > MAX_STACKS:
                    raise _TooMany
                if not now:
                    break
            self._ways[stack, character] = most
        return self._ways[stack, character]

    def _takes(self, place: int, character: int) -> bool:
        element = self._elements[place] if place >= 0 else None
        return isinstance(element, Characters) and element.match(character)

    def characters(self, stacks: Stacks) -> list[int]:
        """One character of each kind that `stacks` tell apart, those that most of them take first."""
        places = Counter(self._stacks[s][0] for s in stacks)
        waiting = [(e, n) for place, n in places.items() if isinstance(e := self._elements[place], Characters)]
        self.steps += len(waiting)
        kinds = sorted({high + 1 if e.negated else low for e, _ in waiting for low, high in e.ranges})[:MAX_KINDS]
        taken = {c: sum(n for e, n in waiting if e.match(c)) for c in kinds}
        return sorted((c for c, n in taken.items() if n), key=lambda c: (-taken[c], c))


def _try_out(grammar: Rules, rules: list[int]) -> None:
    """Look, from each rule in turn, for a text that can be read in ever more ways.

    A trial, no proof: what is found is bad, and what is not found may be.
    """
    machine = _Machine(grammar)
    for rule in rules:
        try:
            _try_rule(machine, rule)
        except _TooMany as e:
            raise _too_many(f"the texts of {grammar.name(rule)}") from e
        if machine.steps > TRIAL_STEPS:
            return


def _try_rule(machine: _Machine, rule: int) -> None:
    """Short texts first, but those at once that can be read in more ways than what they go on from."""
    end = machine.steps + TRIAL_STEPS // 8
    todo, seen = deque([machine.begin(rule)]), set[Stacks]()
    while todo and machine.steps < end:
        stacks = todo.popleft()
        characters = machine.characters(stacks)
        for character in characters[:MAX_TRIED]:
            machine.repeat(stacks, character)
        for character in characters[: min(MAX_TRIED, 1 + TRIAL_MOVES // len(stacks))]:
            after = machine.step(stacks, character)
            if len(after) > MAX_STACKS or machine.entered_twice(after, rule):
                raise _TooMany
            if after not in seen:
                seen.add(after)
                (todo.appendleft if len(after) > len(stacks) else todo.append)(after)
