"""Gates on what heads put out."""

from .method import Gated as Gated
from .method import GatedConfig as GatedConfig
from .method import saved_gates as saved_gates
