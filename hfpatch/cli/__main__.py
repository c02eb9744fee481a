"""`python -m hfpatch.cli`."""

from . import main

main()
