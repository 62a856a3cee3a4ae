"""`edgelora chat`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgelora.cli.arguments import GGUFBase, Unverified
from edgelora.cli.running import Attach, Worker, attached, engine_config, sampling_of, with_runtime_options


@with_runtime_options
def chat(
    base: GGUFBase,
    adapter: Attach = None,
    system: Annotated[str | None, typer.Option(help="A system message; the active adapter's own without it.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 512,
    allow_unverified_base: Unverified = False,
    worker: Worker = False,
    **options: Any,
) -> None:
    """Talk to a model, and switch, blend and compare adapters while you do; /help shows how.

    The first adapter answers at first. Alt-Enter begins another line, Ctrl-C stops an answer, Ctrl-D ends the chat.

    Example: `edgelora chat base.gguf --adapter home=home.gguf --adapter poet=poet.gguf`
    """
    from edgelora.pipeline.live import Serving, history_file, serving
    from runtime.chat import Chat, Settings
    from runtime.terminal import talk

    adapters = attached(adapter)
    settings = Settings(system, sampling_of(options), max_tokens, allow_unverified_base)
    scales = [(one.name, one.scale) for one in adapters]
    with serving(Serving(base, adapters, engine_config(options), allow_unverified_base, worker)) as service:
        talk(Chat(service, settings, dict(scales[:1]), dict(scales)), history_file())
