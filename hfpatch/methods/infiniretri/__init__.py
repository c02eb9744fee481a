"""InfiniRetri: a long text read in pieces, keeping the sentences that attention points to."""

from .method import InfiniRetri as InfiniRetri
from .method import InfiniRetriConfig as InfiniRetriConfig
