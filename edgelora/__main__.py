"""The command's entry. Imports only the command line, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path


def main() -> None:
    """Run the command line; never import modules from the folder one happens to stand in."""
    checkout = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if p not in ("", str(Path.cwd())) or Path(p or ".").resolve() == checkout]
    from edgelora.cli import run
    from edgelora.cli.terminal import outlive

    outlive()
    with ExitStack() as stack:
        if os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("RANK", "0") != "0":
            # of torchrun's processes the first one talks, of the others' errors too; a traceback passes this block
            nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        code = run()
    sys.exit(code)


if __name__ == "__main__":
    main()
