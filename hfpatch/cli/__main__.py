"""`python -m hfpatch.cli`."""

from .main import main

main()
