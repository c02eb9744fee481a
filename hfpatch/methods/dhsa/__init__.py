"""Dynamic hierarchical sparse attention: chunk boundaries, their scores, and the choice of tokens."""

from .method import KEY as KEY
from .method import Dhsa as Dhsa
from .method import DhsaConfig as DhsaConfig
