"""`edgelora chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgelora.cli.arguments import Base, Unverified, named


def chat(
    base: Base,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A GGUF adapter, NAME=FILE; repeatable. The first one is on.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message; the active adapter's own without it.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0, max=10)] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 512,
    context: Annotated[
        int | None, typer.Option(help="Room for the conversation, in tokens; 2048, or what the base has.", min=16)
    ] = None,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.", min=0)] = 0,
    allow_unverified_base: Unverified = False,
) -> None:
    """Talk to a model and switch adapters while you do: /adapter NAME [scale], /adapters, /base, /reset, /quit.

    Example: `edgelora chat base.gguf --adapter home=home.gguf --adapter poet=poet.gguf`
    """
    from edgelora.base.model import open_base
    from runtime.chat import Chat, Settings, talk
    from runtime.scorer import ScoringEngine as Engine

    opened = open_base(base)
    if not adapter:
        _ = opened.template  # a base without one is refused before it is loaded; an adapter may bring one
    adapters = [named(text) for text in adapter or []]
    room = context or min(2048, opened.context)
    with Engine(opened, n_ctx=room) as engine:
        for name, path in adapters:
            engine.load(name, path, allow_unverified=allow_unverified_base)
        if adapters:
            engine.use({adapters[0][0]: 1.0})
        talk(Chat(engine, Settings(system, temperature, max_tokens, seed)))
