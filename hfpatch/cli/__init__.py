"""The `hfpatch` command."""

from .main import main as main
