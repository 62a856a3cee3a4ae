"""`edgelora perplexity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import Base, Engine, Json, Unverified, scaled
from edgelora.words import size

if TYPE_CHECKING:
    from edgelora.evaluate.divergence import Divergence, Estimate
    from edgelora.pipeline.perplexity import Measured


def perplexity(
    base: Base,
    text: Annotated[
        Path | None, typer.Option(help="A text in UTF-8; a reference file brings its own.", show_default=False)
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(help="How many windows; the whole text without it.", min=1, show_default=False)
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A reference: a .gguf, or a file of --save-reference.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="An adapter[:scale] to run live over the model.", show_default=False)
    ] = None,
    engine: Engine = "auto",
    context: Annotated[int, typer.Option(help="Tokens of a window; the second half of each is scored.", min=8)] = 512,
    save_reference: Annotated[
        Path | None,
        typer.Option(help="Keep this model's predictions here; all of them if it ends in .kld.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="With --save-reference: how many tokens of each position.", min=1)] = 256,
    threads: Annotated[int | None, typer.Option(help="All physical cores without it.", min=1)] = None,
    allow_unverified_base: Unverified = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a text as llama-perplexity has it, bits per byte, and how far from a reference: KL, Δp, same top.

    Example: `edgelora perplexity mine-Q4_K_M.gguf --text wiki.txt --against mine-F16.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.pipeline.engines import TORCH, choose_engine
    from edgelora.pipeline.perplexity import Run, measure

    mine = scaled(adapter) if adapter else None
    where = choose_engine(engine, base, mine and mine[0])
    run = Run(
        base, text, mine, against, save_reference, context, chunks, top, threads, allow_unverified_base, where.value
    )
    with listener(as_json) as display:
        if where.value == TORCH:
            display.say(f"in torch ({where.why})")
        found = measure(run, display.show)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _draw(found)


def _draw(found: Measured) -> None:
    from edgelora.cli.display import output

    console, p = output(), found.perplexity
    lines = [
        f"perplexity     {p.value:.4f} ± {p.error:.5f}",
        f"bits per byte  {found.bits_per_byte:.4f}",
        f"scored         {p.n_tokens:,} tokens in {found.n_windows} windows of {found.context}, "
        f"{found.tokens_per_s:.0f} tokens/s, {size(found.peak_bytes)}",
    ]
    if found.divergence is not None:
        top = found.against_top
        kept = f": its {top} likeliest tokens and the mass of the rest, so KL is never above the true" if top else ""
        lines += ["", f"against {found.against}{kept}", *_against(found.divergence)]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _against(d: Divergence) -> list[str]:
    def write(estimate: Estimate, digits: int, factor: float = 1.0, unit: str = "") -> str:
        text = f"{estimate.value * factor:.{digits}f} ± {estimate.error * factor:.{digits}f}{unit}"
        if estimate.interval_95 is None:
            return text
        low, high = (f"{bound * factor:.{digits}f}" for bound in estimate.interval_95)
        return f"{text}  (95 % by windows: {low} … {high})"

    def quantiles(values: dict[float, float], digits: int, factor: float = 1.0) -> str:
        named = {0.5: "median", 0.9: "90 %", 0.99: "99 %", 0.999: "99.9 %", 1.0: "max"}
        return ", ".join(f"{name} {values[f] * factor:.{digits}f}" for f, name in named.items())

    return [
        f"reference      {write(d.reference_perplexity, 4)}",
        f"ln ratio       {write(d.ln_ratio, 6)}",
        f"KL (nats)      {write(d.kl, 6)}",
        f"               {quantiles(d.kl_quantiles, 6)}",
        f"Δp             {write(d.delta_p, 3, 100, ' %')}; RMS {write(d.delta_p_rms, 3, 100, ' %')}",
        f"same top       {write(d.same_top, 3, 100, ' %')}",
    ]
