"""The command's entry. Imports only the command line, so that `--help` is instant."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Run the command line; never import modules from the folder one happens to stand in."""
    checkout = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if p not in ("", str(Path.cwd())) or Path(p or ".").resolve() == checkout]
    from edgelora.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
