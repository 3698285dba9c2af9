"""`python -m dlplora.cli`."""

from dlplora.cli import main

main()
