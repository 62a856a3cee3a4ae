"""The next token of one conversation: from a row of logits, by llama.cpp's own samplers in llama.cpp's own order."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from edgelora.errors import EngineError
from runtime.binding import Candidates, GrammarSampler, Model, SamplerChain
from runtime.grammar import grammar_of
from runtime.limits import check_sampling
from runtime.service import Sampling, TokenLogprob
from runtime.text import WholeCharacters

DRY_BREAKERS = (b"\n", b":", b'"', b"*")  # llama.cpp's: a repetition does not reach across them
LOOKED_AT_FIRST = 512  # tokens, under a grammar: a hundredth of a vocabulary, in a hundredth of the time
MIROSTAT_TOKENS = 100  # of which mirostat 1 estimates the distribution's shape


class Sampler:
    """Picks the tokens of one conversation. `pick`, then `accept` what was kept; `close` frees what lies in C.

    Belongs to the thread that owns the model: all samplers share its room for candidates.
    """

    def __init__(self, model: Model, sampling: Sampling, last_n: int) -> None:
        self._model, self._sampling = model, sampling
        self._chain: SamplerChain | None = None
        self._form: Form | None = None
        grammar = grammar_of(sampling)
        try:
            if not _plainly_greedy(sampling) or model.suppressed:
                self._chain = _chain(model, sampling, last_n)
            if grammar is not None:
                self._form = Form(model, grammar)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def of(model: Model, sampling: Sampling, *, n_ctx: int, prompt: Iterable[int] = ()) -> Sampler:
        """A sampler that has seen `prompt` (penalties count its tokens too, as in llama-server).

        n_ctx: the context's length, which a `…_last_n` of -1 stands for.
        Raises ConfigError for settings, a grammar or a schema that cannot be.
        """
        check_sampling(sampling, model.n_vocab)
        sampler = Sampler(model, sampling, n_ctx)
        if sampler._chain is not None:
            for token in prompt:
                sampler._chain.accept(token)
        return sampler

    def pick(self, logits: np.ndarray) -> int:
        """The token to follow: logits is float32 (V,), left as it is. The same seed and rows give the same tokens.

        Raises EngineError if they are no numbers, or if no token fits the grammar.
        """
        best = int(logits.argmax())  # of a NaN if there is one
        if not math.isfinite(logits[best]):
            raise EngineError(
                what="the model's logits are not numbers",
                why="its weights or an adapter's overflow; whatever is drawn from them is noise",
                fix="lower the adapter's scale, or check it with `edgelora doctor`",
            )
        token = best if self._chain is None else self._chain.pick(self._model.candidates.fill(logits))
        # as llama.cpp does: the grammar looks at the whole vocabulary only if the token drawn without it does not fit
        if self._form is None or self._form.allows(token):
            return token
        return self._pick_fitting(logits, self._form)

    def _pick_fitting(self, logits: np.ndarray, form: Form) -> int:
        if self._chain is None:  # the few likeliest mostly hold one, and are soon looked through
            few = likeliest(logits, LOOKED_AT_FIRST)
            candidates = self._model.candidates.fill(logits[few], few)
            form.restrict(candidates)
            if (token := next(filter(form.is_text, candidates.possible()), None)) is not None:
                return token
        broken: list[int] = []  # fit the grammar, but are no UTF-8
        while True:
            candidates = self._model.candidates.fill(logits)
            form.restrict(candidates)
            candidates.forbid(broken)
            if not candidates.keep_possible():
                raise EngineError(
                    what="no token fits the grammar",
                    why="the model's vocabulary cannot spell what must come next",
                    fix="check the grammar",
                )
            token = candidates.likeliest() if self._chain is None else self._chain.pick(candidates)
            if form.is_text(token):
                return token
            broken.append(token)

    def accept(self, token: int) -> None:
        """Take note that `token` was kept. Raises EngineError if the grammar does not allow it."""
        if self._form is not None:
            self._form.accept(token)
        if self._chain is not None:
            self._chain.accept(token)

    def logprob(self, logits: np.ndarray, token: int) -> TokenLogprob | None:
        """What is reported of `token` if `Sampling.logprobs` asks for it; logits is the row it was picked from."""
        if self._sampling.logprobs is None:
            return None
        logprob, top = log_probabilities(logits, token, self._sampling.logprobs)
        return TokenLogprob(token, self._model.piece(token), logprob, top)

    def close(self) -> None:
        for part in (self._chain, self._form):
            if part is not None:
                part.close()


class Form:
    """What a grammar allows next: its characters by llama.cpp, and that they are UTF-8, which llama.cpp leaves open."""

    def __init__(self, model: Model, grammar: str) -> None:
        self._model = model
        self._grammar = GrammarSampler(model, grammar)
        self._characters = WholeCharacters()

    def restrict(self, candidates: Candidates) -> None:
        """Leave no chance to tokens that the grammar does not allow."""
        self._grammar.restrict(candidates)

    def is_text(self, token: int) -> bool:
        """Whether the answer stays UTF-8 with it."""
        return self._characters.allows(self._model.piece(token), last=self._model.ends_generation(token))

    def allows(self, token: int) -> bool:
        """Whether it stays UTF-8 with it and fits the grammar."""
        return self.is_text(token) and self._grammar.allows(token)

    def accept(self, token: int) -> None:
        """Go on behind this token. Raises EngineError if it is not allowed."""
        if not self.allows(token):  # C would abort the process
            raise EngineError(
                what=f"token {token} does not fit the grammar",
                why="it was not picked under it",
                fix="accept only what pick() gave",
            )
        self._grammar.accept(token)
        self._characters.accept(self._model.piece(token))

    def close(self) -> None:
        self._grammar.close()


def log_probabilities(logits: np.ndarray, token: int, n_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log-softmax (nats) of `token` and of the `n_top` likeliest, the likeliest first; logits is float32 (V,)."""
    peak = logits.max()
    log_total = math.log(np.exp(logits - peak).sum(dtype=np.float64)) + float(peak)
    best = likeliest(logits, n_top) if n_top else ()
    return float(logits[token]) - log_total, tuple((int(i), float(logits[i]) - log_total) for i in best)


def likeliest(logits: np.ndarray, n: int) -> np.ndarray:
    """The ids of the `n` largest logits, the largest first; of equals the lower id."""
    n = min(n, len(logits))
    best = np.argpartition(logits, -n)[-n:]
    ordered: np.ndarray = best[np.lexsort((best, -logits[best]))]
    return ordered


def _plainly_greedy(s: Sampling) -> bool:
    """Whether the answer is the largest logit of each row (top-k, top-p and min-p never drop that one)."""
    return not (s.temperature or s.logit_bias or s.xtc_probability or s.dry_multiplier or _penalizes(s))


def _penalizes(s: Sampling) -> bool:
    return bool(s.repeat_penalty != 1 or s.presence_penalty or s.frequency_penalty)


def _chain(model: Model, s: Sampling, last_n: int) -> SamplerChain:
    """The order of llama.cpp's common/sampling.cpp; what is off is left out."""
    chain = SamplerChain(model)
    bias = {**s.logit_bias, **dict.fromkeys(model.suppressed, -math.inf)}
    try:
        if bias:
            chain.add_bias(bias)
        if s.mirostat:
            chain.add("temp", s.temperature)
            _add_mirostat(chain, model, s)
        else:
            _add_truncation(chain, model, s, last_n)
            if s.temperature:
                chain.add("temp_ext", s.temperature, 0.0, 1.0)
                chain.add("dist", s.seed)
            else:
                chain.add("greedy")
    except BaseException:
        chain.close()
        raise
    return chain


def _add_mirostat(chain: SamplerChain, model: Model, s: Sampling) -> None:
    if s.mirostat == 1:
        chain.add("mirostat", model.n_vocab, s.seed, s.mirostat_tau, s.mirostat_eta, MIROSTAT_TOKENS)
    else:
        chain.add("mirostat_v2", s.seed, s.mirostat_tau, s.mirostat_eta)


def _add_truncation(chain: SamplerChain, model: Model, s: Sampling, last_n: int) -> None:
    def back(n: int) -> int:  # C takes -1 for 0, and reserves what it is told
        return last_n if n < 0 else min(n, last_n)

    if _penalizes(s):
        penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        chain.add("penalties", model.n_vocab, back(s.penalty_last_n), *penalties)
    if s.dry_multiplier:
        settings = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, back(s.dry_penalty_last_n))
        chain.add_dry(*settings, breakers=DRY_BREAKERS)
    if s.top_k:
        chain.add("top_k", s.top_k)
    if s.top_p < 1:
        chain.add("top_p", s.top_p, 0)
    if s.min_p > 0:
        chain.add("min_p", s.min_p, 0)
    if s.xtc_probability:
        chain.add("xtc", s.xtc_probability, s.xtc_threshold, 0, s.seed)
