"""``rescompress``, ``python -m rescompress``: the command line, also under ``torchrun -m rescompress``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; an interrupt while it is still being imported ends with 130, too."""
    try:
        from rescompress.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
