"""`python -m hfpatch` is the `hfpatch` command."""

from .cli import main

if __name__ == "__main__":
    main()
