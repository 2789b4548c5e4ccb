"""``rescompress``, ``python -m rescompress``: the command line, also under ``torchrun -m rescompress``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; an interrupt while it is still being imported ends with 130, too."""
    for name in ("COLUMNS", "LINES"):  # Rich takes any digit of Unicode for a number, and fails
        if not os.environ.get(name, "0").isdecimal():
            del os.environ[name]
    try:
        from rescompress.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
