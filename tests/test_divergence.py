"""Perplexity and divergence from a reference against llama-perplexity's digits, its file format, and the formulas."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from converters.plan import QuantizeOptions
from converters.quantize import write_quantized
from edgelora.cli import run
from edgelora.errors import ConfigError, DataError, EngineError, FileFormatError
from edgelora.evaluate.divergence import Candidate, Compared, Exact, compare, divergence
from edgelora.evaluate.perplexity import windows
from edgelora.evaluate.reference_file import About, ReferenceFile, ReferenceWriter, about_file, is_reference
from edgelora.pipeline.perplexity import Run, measure

N_VOCAB, CONTEXT, N_WINDOWS = 101, 16, 3
TEXT = "turn the kitchen lights on, please, and then close the blinds in the bedroom\n" * 12


def logits_of(seed, n=CONTEXT - 1 - CONTEXT // 2, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, (n, N_VOCAB)).astype(np.float32)


@pytest.fixture
def parts():
    return windows(np.random.default_rng(9).integers(0, N_VOCAB, CONTEXT * N_WINDOWS).tolist(), CONTEXT)


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """A tiny model in F16 and in Q4_0, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("F16", "Q4_0"):
        write_quantized(tiny.path, folder / f"{kind}.gguf", QuantizeOptions(kind))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def run_of(files, name="Q4_0", **settings):
    return Run(**{"model": files / f"{name}.gguf", "text": files / "text.txt", "context": 64, "threads": 1, **settings})


# -- oracle: llama.cpp's own tool ------------------------------------------------------------------------------------

# llama-perplexity -m FILE -f wikitext-2-raw.test.txt -c 512 --chunks 2 -t 1, of llama.cpp 0c1e57098: F16.gguf writing
# --kl-divergence-base, then Q4_K_M.gguf with --kl-divergence. Those of Q4_K_M are of a CPU with AVX-512 and VNNI.
F16_PPL, F16_ERROR = "21.2755", "3.12919"
Q4_K_M = {
    "perplexity": (22.270947, 3.302653), "reference_perplexity": (21.168249, 3.092936),
    "ln_ratio": (0.050781, 0.019484), "ratio": (1.052092, 0.020499), "difference": (1.102698, 0.469791),
    "kl": (0.064750, 0.005857), "delta_p": (-0.00681, 0.00296), "delta_p_rms": (0.06716, 0.00656),
    "same_top": (0.87843, 0.01448),
}  # fmt: skip
KL_QUANTILES = {0.5: 0.037419, 0.9: 0.128398, 0.99: 0.551846, 0.999: 1.525281, 1.0: 2.347361}


@pytest.mark.real
def test_digits_are_those_of_llama_perplexity(smollm, shared_data, tmp_path):
    text = shared_data / "evals" / "wikitext-2-raw.test.txt"
    f16, quantized, kept = tmp_path / "F16.gguf", tmp_path / "Q4_K_M.gguf", tmp_path / "f16.kld"
    write_quantized(smollm, f16, QuantizeOptions("F16"))
    write_quantized(f16, quantized, QuantizeOptions("Q4_K_M"))
    found = measure(Run(f16, text, save=kept, chunks=2, threads=1)).perplexity
    assert (f"{found.value:.4f}", f"{found.error:.5f}") == (F16_PPL, F16_ERROR)
    against = measure(Run(quantized, against=kept, threads=1)).divergence
    assert against is not None
    assert against.reference_perplexity.value == pytest.approx(Q4_K_M["reference_perplexity"][0], abs=2e-6)
    assert against.n_tokens == 510
    for name, (value, error) in Q4_K_M.items():  # on a CPU of another kind the last digits differ
        estimate = getattr(against, name)
        assert estimate.value == pytest.approx(value, rel=0.03, abs=5e-3), name
        assert estimate.error == pytest.approx(error, rel=0.1), name
    assert against.kl_quantiles[0.5] == pytest.approx(KL_QUANTILES[0.5], rel=0.05)


def test_the_tool_prints_the_same_and_reads_what_we_keep(files, tmp_path):
    """To the last digit but one, on one CPU; our .kld file in its hands, and its file in ours."""
    tool = Path(os.environ.get("EDGELORA_LLAMA_TOOLS", "nowhere")) / "llama-perplexity"
    if not tool.exists():
        pytest.skip("EDGELORA_LLAMA_TOOLS names no folder with llama-perplexity")
    base = [tool, "-c", "64", "-b", "64", "-t", "1"]  # one window a decode, as ours: the numbers depend on it

    def said(*words: object) -> str:
        done = subprocess.run([*base, *map(str, words)], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def printed(words: str, name: str) -> tuple[float, float]:
        found = re.search(re.escape(name) + r"\s*[:=]\s*(-?[\d.]+)(?: *% *$)?(?: *(?:±|\+/-) *([\d.]+))?", words)
        assert found is not None, name
        return float(found[1]), float(found[2] or "nan")

    theirs, ours, text = tmp_path / "theirs.kld", tmp_path / "ours.kld", files / "text.txt"
    final = said("-m", files / "F16.gguf", "-f", text, "--kl-divergence-base", theirs)
    found = measure(run_of(files, "F16", save=ours)).perplexity
    assert printed(final, "PPL") == pytest.approx((found.value, found.error), rel=1e-7, abs=6e-5)
    for kept in (theirs, ours):
        words = said("-m", files / "Q4_0.gguf", "--kl-divergence-base", kept, "--kl-divergence")
        against = measure(run_of(files, against=kept, text=None)).divergence
        assert against is not None
        rows = {
            "Mean PPL(Q)": against.perplexity, "Mean PPL(base)": against.reference_perplexity,
            "Mean ln(PPL(Q)/PPL(base))": against.ln_ratio, "Mean PPL(Q)/PPL(base)": against.ratio,
            "Mean PPL(Q)-PPL(base)": against.difference, "Mean    KLD": against.kl,
        }  # fmt: skip
        for name, estimate in rows.items():
            assert printed(words, name) == pytest.approx((estimate.value, estimate.error), rel=2e-6, abs=2e-6), name
        shares = {"Mean    Δp": against.delta_p, "RMS Δp": against.delta_p_rms, "Same top p": against.same_top}
        for name, share in shares.items():
            assert printed(words, name) == pytest.approx((100 * share.value, 100 * share.error), abs=1.1e-3), name
        for name, fraction in {"Median  KLD": 0.5, "99.9%   KLD": 0.999, "10.0%   KLD": 0.1, "Maximum KLD": 1}.items():
            assert printed(words, name)[0] == pytest.approx(against.kl_quantiles[fraction], abs=2e-6), name
        assert printed(words, "75.0%   Δp")[0] == pytest.approx(100 * against.delta_p_quantiles[0.75], abs=1.1e-3)


# -- formulas --------------------------------------------------------------------------------------------------------


def test_comparing_is_the_formula_in_float64():
    p, q = logits_of(0), logits_of(1)
    targets = np.arange(len(p))
    found = compare(Exact(p), q, targets)
    log_p, log_q = (z - np.log(np.exp(z.astype(np.float64)).sum(-1, keepdims=True)) for z in (p, q))
    np.testing.assert_allclose(found.kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(found.nll, -log_q[targets, targets], rtol=1e-5)
    np.testing.assert_allclose(found.reference_nll, -log_p[targets, targets], rtol=1e-5)
    assert found.same_top.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_the_figures_are_those_of_the_text():
    draw = np.random.default_rng(3)
    made = [Compared(*(draw.uniform(0.1, 4, 40) for _ in range(3)), draw.random(40) < 0.8) for _ in range(5)]
    found = divergence(made)
    x, y = (np.concatenate([getattr(w, name) for w in made]) for name in ("nll", "reference_nll"))
    n = len(x)
    variance = (np.var(x) + np.var(y) - 2 * np.cov(x, y, ddof=0)[0, 1]) / (n - 1)
    assert found.ln_ratio.value == pytest.approx(x.mean() - y.mean())
    assert found.ln_ratio.error == pytest.approx(math.sqrt(variance))
    assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.perplexity.value == pytest.approx(math.exp(x.mean()))
    dp = np.exp(-x) - np.exp(-y)
    assert found.delta_p_rms.value == pytest.approx(math.sqrt((dp**2).mean()))
    assert found.kl_quantiles[0.9] == pytest.approx(np.quantile(np.concatenate([w.kl for w in made]), 0.9), rel=1e-5)
    low, high = found.kl.interval_95
    assert low < found.kl.value < high
    assert divergence(made[:4]).kl.interval_95 is None


def test_a_model_against_itself_is_exactly_zero(files):
    found = measure(run_of(files, "F16", against=files / "F16.gguf", chunks=3)).divergence
    assert found.kl.value == found.ln_ratio.value == found.ln_ratio.error == found.delta_p_rms.value == 0.0
    assert max(found.kl_quantiles.values()) == 0.0
    assert found.same_top.value == found.ratio.value == 1.0


def test_bits_per_byte_count_the_text_of_the_scored_tokens(files):
    found = measure(run_of(files, "F16", chunks=3))
    p = found.perplexity
    assert p.n_tokens == 3 * 31
    text_bytes = p.n_tokens * math.log2(p.value) / found.bits_per_byte
    assert text_bytes == pytest.approx(round(text_bytes), abs=1e-6)  # whole bytes, and more of them than tokens
    assert text_bytes > p.n_tokens


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all.kld", "likeliest.ref"])
def test_a_reference_file_says_what_the_model_said(parts, tmp_path, name):
    about = about_file(tmp_path / name, CONTEXT, N_VOCAB, N_WINDOWS, N_VOCAB, "")
    writer = ReferenceWriter(tmp_path / name, about, parts)
    for i, part in enumerate(parts):
        writer.add(logits_of(i), part.targets)
    writer.close(whole=True)
    found = ReferenceFile(tmp_path / name)
    assert is_reference(tmp_path / name)
    assert [w.ids.tolist() for w in found.windows] == [w.ids.tolist() for w in parts]
    for i, part in enumerate(parts):
        kept = compare(found.window(i), logits_of(i + 7), part.targets)
        exact = compare(Exact(logits_of(i)), logits_of(i + 7), part.targets)
        step = 16 / 65535 if name == "all.kld" else 1e-5
        np.testing.assert_allclose(kept.kl, exact.kl, atol=2 * step)
        np.testing.assert_allclose(kept.reference_nll, exact.reference_nll, atol=step)
        assert kept.same_top.tolist() == exact.same_top.tolist()


def test_the_kld_file_has_the_tools_layout(parts, tmp_path):
    """Magic, sizes, tokens; then for each position scale, least log p, and a step for each token, filled up to 4."""
    writer = ReferenceWriter(tmp_path / "x.kld", About(CONTEXT, N_VOCAB, 1), parts[:1])
    logits = logits_of(0)
    writer.add(logits, parts[0].targets)
    writer.close(whole=True)
    raw = (tmp_path / "x.kld").read_bytes()
    row = 2 * (2 * ((N_VOCAB + 1) // 2) + 4)
    assert len(raw) == 8 + 12 + 4 * CONTEXT + 7 * row
    assert raw[:20] == b"_logits_" + np.array([CONTEXT, N_VOCAB, 1], "<i4").tobytes()
    first = raw[20 + 4 * CONTEXT :][:row]
    scale, least = np.frombuffer(first[:8], "<f4")
    z = logits[0]
    lowest = max(z.min(), z.max() - 16)
    assert scale == pytest.approx((z.max() - lowest) / 65535, rel=1e-6)
    assert least == pytest.approx(lowest - np.log(np.exp(z.astype(np.float64)).sum()), rel=1e-6)
    assert np.frombuffer(first[8:], "<u2")[z.argmax()] == 65535


@pytest.mark.parametrize("top", [1, 5, 40])
def test_the_likeliest_tokens_never_say_too_much(parts, tmp_path, top):
    path = tmp_path / "some.ref"
    writer = ReferenceWriter(path, About(CONTEXT, N_VOCAB, 1, top), parts[:1])
    writer.add(logits_of(0), parts[0].targets)
    writer.close(whole=True)
    kept = compare(ReferenceFile(path).window(0), logits_of(1), parts[0].targets)
    exact = compare(Exact(logits_of(0)), logits_of(1), parts[0].targets)
    assert (kept.kl <= exact.kl + 1e-5).all()
    assert (kept.kl >= 0).all()
    np.testing.assert_array_equal(kept.reference_nll, exact.reference_nll)  # the target's own is kept


@pytest.mark.parametrize("name", ["all.kld", "likeliest.ref"])
def test_a_file_that_was_stopped_goes_on_and_is_the_same(parts, tmp_path, name):
    about = about_file(tmp_path / name, CONTEXT, N_VOCAB, N_WINDOWS, 8, "digest")
    whole = tmp_path / f"whole-{name}"
    for path, stops in ((whole, ()), (tmp_path / name, (1, 2))):
        writer = ReferenceWriter(path, about, parts)
        for i, part in enumerate(parts):
            if i in stops:
                writer.close(whole=False)
                with path.with_name(f"{name}.part").open("ab") as torn:
                    torn.write(b"half a window")
                assert not path.exists()
                writer = ReferenceWriter(path, about, parts)
                assert writer.done == i
            writer.add(logits_of(i), part.targets)
        writer.close(whole=True)
    assert whole.read_bytes() == (tmp_path / name).read_bytes()


# -- what cannot be scored -------------------------------------------------------------------------------------------


def test_a_broken_reference_file_is_refused(parts, tmp_path):
    path = tmp_path / "x.kld"
    writer = ReferenceWriter(path, About(CONTEXT, N_VOCAB, 1), parts[:1])
    writer.add(logits_of(0), parts[0].targets)
    writer.close(whole=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileFormatError) as e:
        ReferenceFile(path)
    assert "it was not written to its end" in e.value.why
    path.write_bytes(b"_logits_" + np.array([-1, 5, 1 << 30], "<i4").tobytes())
    with pytest.raises(FileFormatError) as e:
        ReferenceFile(path)
    assert "sizes make no sense" in e.value.why


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_never_scored(broken):
    logits = logits_of(0)
    logits[2, 3] = broken
    with np.errstate(invalid="ignore"), pytest.raises(EngineError) as e:
        Candidate(logits, np.zeros(len(logits), np.int64))
    assert e.value.what == "the model's logits are not finite"


def test_what_cannot_be_scored_says_why(files, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("lights on", encoding="utf-8")
    with pytest.raises(DataError, match="shorter than one window of 64 tokens"):
        measure(run_of(files, text=short))
    with pytest.raises(ConfigError, match="no text to score"):
        measure(run_of(files, text=None))
    kept = tmp_path / "other.ref"
    writer = ReferenceWriter(kept, About(CONTEXT, N_VOCAB, 1, 4), windows(range(CONTEXT), CONTEXT))
    writer.add(logits_of(0), np.zeros(7, np.int64))
    writer.close(whole=True)
    with pytest.raises(ConfigError, match="vocabulary has 101 tokens"):
        measure(run_of(files, against=kept))


def test_the_command_prints_figures_or_json(files, tmp_path):
    words = [sys.executable, "-m", "edgelora", "perplexity", str(files / "Q4_0.gguf"), "--context", "64",
             "--text", str(files / "text.txt"), "--chunks", "3", "--against", str(files / "F16.gguf")]  # fmt: skip
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["windows"] == 3
    assert found["scored_tokens"] == found["divergence"]["n_tokens"] == 93
    assert 0 < found["divergence"]["kl"]["value"] < 1
    shown = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert f"perplexity     {found['perplexity']:.4f} ± {found['error']:.5f}" in shown
    assert f"KL (nats)      {found['divergence']['kl']['value']:.6f}" in shown


def test_what_a_compact_reference_leaves_out_is_said(files, tmp_path, capsys):
    words = ["perplexity", str(files / "F16.gguf"), "--context", "64", "--chunks", "1"]
    kept = ["--save-reference", str(tmp_path / "likeliest.ref"), "--top", "5"]
    assert run([*words, "--text", str(files / "text.txt"), *kept]) == 0
    assert run([*words, "--against", str(tmp_path / "likeliest.ref")]) == 0
    assert "its 5 likeliest tokens and the mass of the rest, so KL is never above the true" in capsys.readouterr().out
