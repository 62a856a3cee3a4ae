"""A few fixed prompts that the adapter answers while it is trained, to be read beside the curve."""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.base.model import Base
from edgelora.data.conversation import Message
from edgelora.data.encode import encode_prompt, encode_text
from edgelora.errors import DataError
from edgelora.nn.decoder import Decoder
from edgelora.nn.generate import Until, generate
from edgelora.progress import Sample

MAX_TOKENS = 64  # enough to see how it speaks; a token costs a pass over all weights


class Sampler:
    """Prompts, made ready before the first step: `sampler(decoder)` answers them, always the likeliest token.

    Each is what a user says, behind the `system` message of the data if it has one; a base without a chat template
    goes on with the text as it stands. Raises DataError for prompts that leave no room for an answer.
    """

    def __init__(
        self, prompts: Sequence[str], base: Base, system: str | None = None, max_tokens: int = MAX_TOKENS
    ) -> None:
        self._prompts, self._tokenizer = prompts, base.tokenizer
        context = base.config.max_position_embeddings
        self._until = Until(max_tokens, frozenset(base.tokenizer.eog_ids), context)
        self._ids = [_prompt_ids(prompt, base, system) for prompt in prompts]
        unusable = [p for p, ids in zip(prompts, self._ids, strict=True) if not 0 < len(ids) < context]
        if unusable:
            raise DataError(
                what=f"these samples cannot be answered: {', '.join(map(_shortened, unusable))}",
                why=f"an empty prompt says nothing, and this base sees {context} tokens, prompt and answer together",
                fix="shorten them, or leave them out",
            )

    def __call__(self, decoder: Decoder) -> tuple[Sample, ...]:
        """What the decoder, with the adapter that is on it, answers to each prompt."""
        answers = generate(decoder, self._ids, self._until)
        return tuple(self._sample(prompt, answer) for prompt, answer in zip(self._prompts, answers, strict=True))

    def _sample(self, prompt: str, answer: list[int]) -> Sample:
        ended = bool(answer) and answer[-1] in self._until.stop
        return Sample(prompt, self._tokenizer.decode(answer[:-1] if ended else answer), ended)


def _prompt_ids(prompt: str, base: Base, system: str | None) -> list[int]:
    if base.template_source is None:
        return encode_text(prompt, base.tokenizer)
    before = [] if system is None else [Message("system", system)]
    return encode_prompt([*before, Message("user", prompt)], base.tokenizer, base.template)


def _shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else f"{prompt[:39]}…")
