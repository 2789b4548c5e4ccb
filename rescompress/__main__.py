"""``python -m rescompress``: the command line, also under ``torchrun -m rescompress``."""

from rescompress.cli.app import main

main()
