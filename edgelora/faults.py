"""What is wrong with a setting, in our words: what it is, what it must be, or the value that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

# What a setting must, by the kinds of pydantic's faults that our models know.
MUST = {
    "greater_than_equal": "be at least {ge:g}", "greater_than": "be above {gt:g}",
    "less_than_equal": "be at most {le:g}", "less_than": "be below {lt:g}",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "be a number"), "finite_number": "be a finite number",
    **dict.fromkeys(("bool_parsing", "bool_type"), "be true or false"),
    "string_type": "be a text", "path_type": "be a path", "tuple_type": "be a list",
    "string_too_short": "not be", "too_short": "not be", "string_pattern_mismatch": "match {pattern}",
}  # fmt: skip
LISTED = {"method": "`edgelora methods` lists all"}  # settings that have too many values for one message


class Meant(NamedTuple):
    """What somebody means who writes a word that is no value of a setting: what that is, and what to write."""

    what: str
    write: str


_QUANTIZED = "over a base of blocks as it is, or over floats with --base-dtype nf4"
_WHOLE = Meant("full fine-tuning", "--method full --base-dtype f32")
_NORMS = Meant("what trains the norms alone", "--method layernorm")
_BOTTLENECK = Meant("what trains a bottleneck behind each block", "--method houlsby")
_SOFT = Meant("what trains embeddings before the prompt", "--method prompt_tuning")
# THE TABLE of what else people call values, by setting and `_plain` word. Taking one for another unasked would put
# another name into run.json than the one that was typed.
MEANT: dict[str, dict[str, Meant]] = {
    "method": {
        "qlora": Meant("a LoRA over a quantized base", f"--method lora {_QUANTIZED}"),
        "qdora": Meant("a DoRA over a quantized base", f"--method dora {_QUANTIZED}"),
        "qpissa": Meant(
            "a LoRA that starts as what was taken out of its base before that was quantized",
            "`edgelora residual MODEL --to Q4_0 --rank 16 --out REST`, then train over REST with --method loftq "
            "--original MODEL --rank 16",
        ),
        "lora+": Meant("another spelling of loraplus", "--method loraplus"),
        "activatedlora": Meant("what alora is short for", "--method alora"),
        "ptuningv2": Meant("what trains keys and values of every layer", "--method prefix_tuning"),
        "trainabletokens": Meant("what trains rows of the embedding", "--method token_rows --train-tokens TOKEN"),
        **dict.fromkeys(("finetune", "finetuning", "fullfinetune", "fullfinetuning", "fft", "ft"), _WHOLE),
        **dict.fromkeys(("lntuning", "layernormtuning", "normtuning"), _NORMS),
        **dict.fromkeys(("adapter", "adapters", "bottleneck", "houlsbyadapter", "houlsbyadapters"), _BOTTLENECK),
        **dict.fromkeys(("softprompt", "softprompts"), _SOFT),
        **{name: Meant("no method but an objective", f"--objective {name}, with any method")
           for name in ("sft", "dpo", "ipo", "orpo", "kto")},
        "neftune": Meant("noise on what any method learns from", "--neftune-alpha 5"),
    },
}  # fmt: skip

# what TRL, Axolotl and others call our settings
ELSEWHERE = {
    "lr": "learning_rate", "lr_scheduler_type": "schedule", "r": "rank", "lora_r": "rank", "lora_alpha": "alpha",
    "model": "base", "model_name_or_path": "base", "base_model": "base", "datasets": "data", "dataset": "data",
    "output_dir": "out", "num_train_epochs": "epochs", "num_epochs": "epochs", "max_seq_length": "max_length",
    "batch_size": "batch_rows", "per_device_train_batch_size": "batch_rows", "sequence_len": "max_length",
}  # fmt: skip


def in_words(model: type[BaseModel], fault: ErrorDetails) -> str:
    """What is wrong with a setting: `it is 0, and must be at least 1`; in pydantic's words where that is rare."""
    name, kind, value = str(fault["loc"][0]), fault["type"], fault["input"]
    if kind == "literal_error" and (values := values_of(model.model_fields[name])):
        return unlike(name, values, value)
    if kind == "extra_forbidden":
        return no_such_setting(name, model)
    if kind == "missing":
        return "it has to be said"
    if kind in MUST:
        shown = "empty" if value in ("", [], ()) else value
        return f"it is {shown}, and must {MUST[kind].format(**fault.get('ctx', {}))}"
    return fault["msg"].removeprefix("Value error, ")


def meant(name: str, values: Collection[str], text: object) -> Meant | None:
    """What is surely meant by a word that is no value of the setting `name`: another spelling or name; else None."""
    word = _plain(str(text))
    if same := next((value for value in values if _plain(value) == word), None):
        return Meant(f"another spelling of {same}", f"--{name.replace('_', '-')} {same}")
    return MEANT.get(name, {}).get(word)


def _plain(text: str) -> str:
    """Without what spellings differ in: `(IA)3` and `ia3` are one, `LoRA-XS` and `lora_xs`."""
    return re.sub(r"[^a-z0-9+]", "", text.lower())


def unlike(name: str, values: Collection[str], text: object) -> str:
    """`lroa is none of its values, did you mean lora? ...`, with where they all stand; or what is surely meant."""
    if known := meant(name, values, text):
        return f"{text} is none of its values: it is {known.what}, which is written {known.write}"
    near = difflib.get_close_matches(str(text), values, 1)
    listed = LISTED.get(name, f"it is one of {', '.join(values)}")
    return f"{text} is none of its values{f', did you mean {near[0]}?' if near else ':'} {listed}"


def no_such_setting(name: str, model: type[BaseModel]) -> str:
    """What to say of a name that `model` has not."""
    near = meant_setting(name, model)
    return f"there is no such setting{f', did you mean {near}?' if near else ''}"


def meant_setting(name: str, model: type[BaseModel]) -> str | None:
    """The setting of `model` that is meant by a name which it has not: another program's for it, or the nearest one."""
    near = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, model.model_fields, 1)
    return near[0] if near and near[0] in model.model_fields else None


def values_of(field: FieldInfo) -> tuple[str, ...]:
    """The names that a field can be, if it is one of a few."""
    parts = (field.annotation, *get_args(field.annotation))  # it may be one of them, or None
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())
