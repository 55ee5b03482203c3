"""The `epo` command, also as `python -m epo`. Says what to install where only the objectives are there."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit code 2 if what it needs is not installed."""
    try:
        from epo.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "epo":
            raise
        sys.stderr.write(
            f"error: {error.name} is not installed. epo's objectives work without it; the epo command needs the extra "
            "train. In a checkout: pip install -e '.[train]'\n"
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
