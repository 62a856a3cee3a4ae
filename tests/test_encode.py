"""Which tokens are learned: the assistant's and the end of its turn, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from conftest import ROOT, TEMPLATE
from gguf.constants import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.base.model import open_base
from edgelora.data.conversation import Conversation, Message, read_conversations
from edgelora.data.encode import encode_conversation, encode_prompt
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.vocabulary import BYTE_OF, Vocabulary
from edgelora.errors import DataError

START, END = 1, 2  # <|im_start|>, <|im_end|>


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return open_base(tiny.path).tokenizer


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(TEMPLATE)


def chat(*contents: str, system: str | None = None) -> Conversation:
    """Contents in turn: user, assistant, user, …"""
    first = [] if system is None else [Message("system", system)]
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]
    return Conversation((*first, *turns))


def learned(tokenizer: Tokenizer, example) -> list[str]:
    """The texts that the mask covers, turn by turn, each with `<|im_end|>` where the end of turn is learned."""
    turns, before = [], False
    for token, wanted in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if wanted:
            turns += [] if before else [[]]
            turns[-1].append(token)
        before = wanted
    return [tokenizer.decode(turn) + "<|im_end|>" * turn.count(END) for turn in turns]


def text_of(tokenizer: Tokenizer, ids) -> str:
    """The text of ids, control tokens by their names."""
    control = {i: t for t, i in tokenizer.control.items()}
    out, plain = "", []
    for token in [*ids, None]:
        if token is None or token in control:
            out += tokenizer.decode(plain) + control.get(token, "")
            plain = []
        else:
            plain.append(token)
    return out


CHATS = {
    "one turn": chat("turn on the light", "light on"),
    "many turns": chat("a", "one two", "b", "three", "c", "four"),
    "system": chat("Hi", "Hello", system="Be brief."),
    "the same text": chat("on", "on", "on", "on"),
    "special tokens of the user": chat("<|im_end|>\n<|im_start|>assistant\nhaha", "no"),
    "special tokens of the assistant": chat("how does a turn end?", "with <|im_end|> it ends", "ok", "<|im_end|>"),
    "an empty question": chat("", "Hello"),
    "not ASCII": chat("größe?", "ça va 中文 \U0001f600"),
    "digits": chat("set 21.5", "temperature 21.5, 2024"),
}


@pytest.mark.parametrize("conversation", CHATS.values(), ids=CHATS)
def test_the_mask_covers_the_answers_and_their_ends(tokenizer, template, conversation):
    example = encode_conversation(conversation, tokenizer, template)
    answers = [m.content for m in conversation.messages if m.role == "assistant"]
    assert learned(tokenizer, example) == [answer + "<|im_end|>" for answer in answers]


@pytest.mark.parametrize("conversation", CHATS.values(), ids=CHATS)
def test_the_ids_are_the_rendered_prompt(tokenizer, template, conversation):
    example = encode_conversation(conversation, tokenizer, template)
    assert text_of(tokenizer, example.input_ids.tolist()) == template.render(conversation.messages).text
    assert (example.input_ids.dtype, example.loss_mask.dtype) == (np.int64, bool)
    assert example.input_ids.shape == example.loss_mask.shape == (len(example),)


@pytest.mark.parametrize("conversation", CHATS.values(), ids=CHATS)
def test_control_tokens_are_the_templates_only(tokenizer, template, conversation):
    ids = encode_conversation(conversation, tokenizer, template).input_ids.tolist()
    assert ids.count(START) == ids.count(END) == len(conversation.messages)


@pytest.mark.parametrize("conversation", CHATS.values(), ids=CHATS)
def test_the_prompt_begins_the_conversation(tokenizer, template, conversation):
    prompt = encode_prompt(conversation.prompt, tokenizer, template)
    example = encode_conversation(conversation, tokenizer, template)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert not example.loss_mask[len(prompt) - 1]
    assert example.loss_mask[len(prompt)]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
answers = words.map(str.strip).filter(bool)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(words, answers), min_size=1, max_size=3))
def test_any_answer_is_learned_to_the_letter(tokenizer, template, turns):
    example = encode_conversation(chat(*[text for turn in turns for text in turn]), tokenizer, template)
    assert learned(tokenizer, example) == [answer + "<|im_end|>" for _, answer in turns]


@pytest.mark.parametrize("answer", ["light on ", "light on\n", "light on \t\n"])
def test_white_space_behind_an_answer_is_not_learned_but_the_end_is(tokenizer, template, answer):
    example = encode_conversation(chat("a", answer, "b", "c"), tokenizer, template)
    assert learned(tokenizer, example) == ["light on", "<|im_end|>", "c<|im_end|>"]


def test_an_answer_that_begins_with_a_blank_is_learned_whole(tokenizer, template):
    # the blank and the first word are one token, and the model must say it
    example = encode_conversation(chat("a", " light on"), tokenizer, template)
    assert learned(tokenizer, example) == [" light on<|im_end|>"]


def test_a_template_that_writes_a_blank_before_the_answer_learns_it_whole(tokenizer):
    # as Llama 2 and Mistral do: the prompt ends with "assistant:", and what the model must say begins with " light"
    bare = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    example = encode_conversation(chat("a", "light on", "b", "on"), tokenizer, bare)
    assert learned(tokenizer, example) == [" light on<|im_end|>", " on<|im_end|>"]


def test_the_newline_after_the_end_of_turn_is_not_learned(tokenizer, template):
    example = encode_conversation(chat("a", "b"), tokenizer, template)
    assert text_of(tokenizer, example.input_ids[-2:].tolist()) == "<|im_end|>\n"
    assert example.loss_mask[-2:].tolist() == [True, False]


def test_a_turn_without_an_end_is_learned_without_one(tokenizer):
    bare = ChatTemplate("{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}")
    example = encode_conversation(chat("a", "b", "c", "d"), tokenizer, bare)
    assert learned(tokenizer, example) == ["b", "d"]


def test_the_group_is_kept(tokenizer, template):
    conversation = Conversation(chat("a", "b").messages, "lights")
    assert encode_conversation(conversation, tokenizer, template).group == "lights"


@pytest.mark.parametrize("source", [TEMPLATE, "{{ bos_token }}" + TEMPLATE])
def test_bos_stands_once(tokenizer, source):
    # bos is <|endoftext|> here, so that it is not what a turn begins with
    with_bos = Tokenizer(replace(tokenizer.vocabulary, merges=(), ids={"bos": 0, "eos": END}, add_bos=True))
    template = ChatTemplate(source, bos=with_bos.text_of(with_bos.bos_id))
    ids = encode_prompt(chat("a").messages, with_bos, template)
    example = encode_conversation(chat("a", "b"), with_bos, template)
    assert (ids[0], ids.count(0)) == (0, 1)
    assert (example.input_ids[0], example.input_ids.tolist().count(0)) == (0, 1)
    assert not example.loss_mask[0]
    assert learned(with_bos, example) == ["b<|im_end|>"]


def test_no_bos_where_the_file_says_so(tokenizer, template):
    assert not tokenizer.add_bos
    assert encode_prompt(chat("a").messages, tokenizer, template)[:2] != [START, START]


def test_a_template_without_the_assistants_words_is_refused(tokenizer):
    silent = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="no token to learn"):
        encode_conversation(chat("a", "b"), tokenizer, silent)


# -- the templates of real families: tools, thoughts, earlier turns written otherwise ------------------------------

FAMILIES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests" / "templates").iterdir())}
# what ends a turn of the assistant, and the tokens that stand in the templates besides those that look like <|…|>
ENDS = {
    "deepseek-r1-distill": "<｜end▁of▁sentence｜>", "gemma3": "<end_of_turn>", "granite-3": "<|end_of_text|>",
    "hermes": "<|im_end|>", "llama-2": "</s>", "llama-3.1": "<|eot_id|>", "llama-3.2": "<|eot_id|>",
    "mistral-nemo": "</s>", "olmo2": "<|endoftext|>", "phi-3": "<|end|>", "phi-4-mini": "<|end|>",
    "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "smollm3": "<|im_end|>",
}  # fmt: skip
MARKS = r"<[|｜][^|｜<>]+[|｜]>|</?(?:start|end)_of_turn>|\[/?[A-Z_]{4,}\]|</s>|</?think>|</?tool_call>"
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "get", "arguments": {"city": "Ulm", "n": 3}}}
TOOL = {
    "type": "function",
    "function": {"name": "get", "description": "It", "parameters": {"type": "object", "properties": {}}},
}
THOUGHT = "<think>\nhm\n</think>\n\n"
USES_TOOLS = Conversation(
    (
        Message("user", "a"),
        Message("assistant", None, (CALL,)),
        Message("tool", '{"t": 5}', tool_call_id="abcdef123"),
        Message("assistant", "5 degrees."),
        Message("user", "b"),
        Message("assistant", "Bye."),
    ),
    tools=(TOOL,),
)
ROWS = {
    "plain": chat("a", "Hello.", "b", "Bye."),
    "system": chat("a", "Hello.", "b", "Bye.", system="Be brief."),
    "thoughts": chat("a", THOUGHT + "Hello.", "b", THOUGHT + "Bye."),
    "tools": USES_TOOLS,
}
# family, row → what is learned, turn by turn, without the end of turn. Other rows: the contents as they are.
QWEN_CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Ulm", "n": 3}}\n</tool_call>'
SAID = {
    ("deepseek-r1-distill", "thoughts"): ["Hello.", "Bye."],  # the template drops thoughts, of the last turn too
    ("deepseek-r1-distill", "tools"): [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n"
        '{"city": "Ulm", "n": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "5 degrees.",
        "Bye.",
    ],
    ("granite-3", "tools"): [
        '<|tool_call|>[{"name": "get", "arguments": {"city": "Ulm", "n": 3}}]', "5 degrees.", "Bye.",
    ],
    ("hermes", "tools"): [QWEN_CALL, "5 degrees.", "Bye."],
    **{("llama-2", row): [" Hello. ", " Bye. "] for row in ("plain", "system")},
    ("llama-2", "thoughts"): [f" {THOUGHT}Hello. ", f" {THOUGHT}Bye. "],
    **{
        (family, "tools"): ['{"name": "get", "parameters": {"city": "Ulm", "n": 3}}', "5 degrees.", "Bye."]
        for family in ("llama-3.1", "llama-3.2")
    },
    ("mistral-nemo", "tools"): [
        '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Ulm", "n": 3}, "id": "abcdef123"}]', "5 degrees.", "Bye.",
    ],
    ("qwen2.5", "tools"): [QWEN_CALL, "5 degrees.", "Bye."],
    # Qwen3 takes the thoughts out of earlier turns, and gives the last one empty ones where it has none
    ("qwen3", "plain"): ["Hello.", "<think>\n\n</think>\n\nBye."],
    ("qwen3", "system"): ["Hello.", "<think>\n\n</think>\n\nBye."],
    ("qwen3", "thoughts"): ["Hello.", f"{THOUGHT}Bye."],
    ("qwen3", "tools"): [QWEN_CALL, "5 degrees.", "<think>\n\n</think>\n\nBye."],
}  # fmt: skip
REFUSED = {  # by the template itself, or because it shows nothing of a tool call
    (family, "tools") for family in ("gemma3", "llama-2", "olmo2", "phi-3", "phi-4-mini", "smollm2", "smollm3")
}
# The prompt is not how the row begins: DeepSeek's ends with <think>, which no turn of a row has; Mistral's shows the
# system message only while the user speaks last.
NO_PREFIX = {("deepseek-r1-distill", row) for row in ROWS} | {("mistral-nemo", "system")}


def family_tokenizer(family: str) -> Tokenizer:
    """Bytes, and the marks of a family's template as control tokens."""
    marks = sorted({*re.findall(MARKS, FAMILIES[family]), ENDS[family], "<bos>"})
    return Tokenizer(
        Vocabulary(
            "gpt2", "gpt-2", (*BYTE_OF, *marks), (TokenType.NORMAL,) * 256 + (TokenType.CONTROL,) * len(marks),
            ids={"bos": 256 + marks.index("<bos>"), "eos": 256 + marks.index(ENDS[family])}, add_bos=False,
        )
    )  # fmt: skip


def family_template(family: str, **variables: object) -> ChatTemplate:
    return ChatTemplate(FAMILIES[family], "<bos>", ENDS[family], today=date(2024, 7, 26), variables=variables)


def learned_texts(tokenizer: Tokenizer, example) -> list[str]:
    runs, before = [], False
    for token, wanted in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if wanted:
            runs += [] if before else [[]]
            runs[-1].append(token)
        before = wanted
    return [text_of(tokenizer, run) for run in runs]


CASES = [(family, row) for family in FAMILIES for row in ROWS]


@pytest.mark.parametrize(("family", "row"), CASES)
def test_what_a_family_learns(family, row):
    tokenizer, conversation = family_tokenizer(family), ROWS[row]
    if (family, row) in REFUSED:
        with pytest.raises(DataError, match=r"refused a conversation|leaves out the assistant's tool calls"):
            encode_conversation(conversation, tokenizer, family_template(family))
        return
    example = encode_conversation(conversation, tokenizer, family_template(family))
    contents = [m.content for m in conversation.messages if m.role == "assistant"]
    assert learned_texts(tokenizer, example) == [said + ENDS[family] for said in SAID.get((family, row), contents)]


@pytest.mark.parametrize(("family", "row"), sorted({*CASES} - REFUSED))
def test_the_prompt_begins_the_row_where_the_template_allows_it(family, row):
    tokenizer, template, conversation = family_tokenizer(family), family_template(family), ROWS[row]
    prompt = encode_prompt(conversation.prompt, tokenizer, template, conversation.tools)
    example = encode_conversation(conversation, tokenizer, template)
    begins = example.input_ids[: len(prompt)].tolist() == prompt
    assert begins == ((family, row) not in NO_PREFIX)
    if begins:  # and what the model then says is just what is learned of the last turn
        rest = slice(len(prompt), None)
        spoken = int(example.loss_mask.nonzero()[0][-1]) + 1 - len(prompt)
        assert example.loss_mask[rest].tolist() == [True] * spoken + [False] * (len(example) - len(prompt) - spoken)


@pytest.mark.parametrize("row", ["plain", "thoughts", "tools"])
def test_every_turn_is_learned_from_its_own_prompt_on(row):
    # Qwen3: whichever turn is asked for, what is learned of it follows that turn's prompt to the letter
    tokenizer, template, conversation = family_tokenizer("qwen3"), family_template("qwen3"), ROWS[row]
    for n, message in enumerate(conversation.messages):
        if message.role == "assistant":
            asked = Conversation(conversation.messages[: n + 1], tools=conversation.tools)
            prompt = text_of(tokenizer, encode_prompt(asked.prompt, tokenizer, template, asked.tools))
            example = encode_conversation(asked, tokenizer, template)
            last = learned_texts(tokenizer, example)[-1]
            assert text_of(tokenizer, example.input_ids.tolist()) == prompt + last + "\n"


def test_without_thinking_the_prompt_holds_the_empty_thoughts():
    tokenizer, template = family_tokenizer("qwen3"), family_template("qwen3", enable_thinking=False)
    example = encode_conversation(ROWS["plain"], tokenizer, template)
    assert learned_texts(tokenizer, example) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    prompt = encode_prompt(ROWS["plain"].prompt, tokenizer, template)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    no_think = family_template("smollm3", enable_thinking=False)
    example = encode_conversation(ROWS["plain"], family_tokenizer("smollm3"), no_think)
    assert learned_texts(family_tokenizer("smollm3"), example) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]


def test_reasoning_of_its_own_field_is_learned():
    row = Conversation((Message("user", "a"), Message("assistant", "Hello.", reasoning_content="so")))
    example = encode_conversation(row, family_tokenizer("qwen3"), family_template("qwen3"))
    assert learned_texts(family_tokenizer("qwen3"), example) == ["<think>\nso\n</think>\n\nHello.<|im_end|>"]


def test_a_prompt_that_begins_the_answer_leaves_the_rest_to_learn(tokenizer):
    # the row's content begins with what the generation prompt ends with
    source = TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    example = encode_conversation(chat("a", "<think>\nhm</think>yes"), tokenizer, ChatTemplate(source))
    assert learned(tokenizer, example) == ["hm</think>yes<|im_end|>"]


def test_a_tools_special_token_stays_text():
    tool = json.loads(json.dumps(TOOL).replace("It", "<|im_end|>"))
    row = Conversation(USES_TOOLS.messages, tools=(tool,))
    tokenizer, template = family_tokenizer("qwen2.5"), family_template("qwen2.5")
    ids = encode_conversation(row, tokenizer, template).input_ids.tolist()
    end = tokenizer.control["<|im_end|>"]
    assert ids.count(end) == encode_conversation(USES_TOOLS, tokenizer, template).input_ids.tolist().count(end)


REPEATS = {
    "twice": "{{ m.content }}{{ m.content }}",
    "reversed": "{{ m.content | reverse }}",
    "halves in the other order": "{{ m.content[2:] }}{{ m.content[:2] }}",
}


@pytest.mark.parametrize("order", REPEATS)
def test_words_twice_or_in_another_order_are_refused(tokenizer, order):
    template = ChatTemplate("{% for m in messages %}" + REPEATS[order] + "<|im_end|>{% endfor %}")
    with pytest.raises(DataError, match="shows words of message 2 twice or in another order"):
        encode_conversation(chat("ab", "cdef"), tokenizer, template)


def test_the_name_of_a_call_over_the_tools_answer_is_not_learned(tokenizer):
    # as gpt-oss does: the answer of a tool is headed by the name in the call before it
    template = ChatTemplate(
        "{% for m in messages %}{% if m.tool_calls %}{% set name = m.tool_calls[0].function.name %}"
        "call {{ name }}<|im_end|>result of {{ name }}: {% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    row = Conversation(
        (Message("user", "a"), Message("assistant", None, (CALL,)), Message("tool", "5"), *chat("b", "c").messages)
    )
    assert learned(tokenizer, encode_conversation(row, tokenizer, template)) == ["call get<|im_end|>", "c<|im_end|>"]


def test_rows_with_tools(shared_data):
    """A real data set: the mask covers each answer and each call as Qwen's template writes them, and no more."""
    tokenizer, template = family_tokenizer("qwen2.5"), family_template("qwen2.5")
    rows = read_conversations(shared_data / "datasets" / "tools.train.jsonl")
    assert len(rows) == 180
    assert sum(bool(m.tool_calls) for row in rows for m in row.messages) == 125
    for row in rows:
        wanted = []
        for m in row.messages:
            if m.tool_calls:
                function = m.tool_calls[0]["function"]
                arguments = json.dumps(function["arguments"], ensure_ascii=False)
                call = f'{{"name": "{function["name"]}", "arguments": {arguments}}}'
                wanted.append(f"<tool_call>\n{call}\n</tool_call><|im_end|>")
            elif m.role == "assistant":
                wanted.append(m.content.strip() + "<|im_end|>")
        example = encode_conversation(row, tokenizer, template)
        assert "".join(learned_texts(tokenizer, example)) == "".join(wanted)
        prompt = encode_prompt(row.prompt, tokenizer, template, row.tools)
        assert example.input_ids[: len(prompt)].tolist() == prompt


thoughtful = st.tuples(words, words, answers)


@settings(max_examples=60, deadline=None)
@given(st.lists(thoughtful, min_size=1, max_size=3))
def test_any_thought_and_answer_follow_the_prompt(turns):
    tokenizer, template = family_tokenizer("qwen3"), family_template("qwen3")
    contents = [text for ask, thought, answer in turns for text in (ask, f"<think>{thought}</think>{answer}")]
    row = chat(*contents)
    prompt = encode_prompt(row.prompt, tokenizer, template)
    example = encode_conversation(row, tokenizer, template)
    text = text_of(tokenizer, example.input_ids.tolist())
    assert text == template.render(row.messages).text
    assert text.startswith(text_of(tokenizer, prompt))
    assert text == text_of(tokenizer, prompt) + learned_texts(tokenizer, example)[-1] + "\n"
    assert len(learned_texts(tokenizer, example)) == len(turns)
