"""Settings: what they may hold, the registry of methods, patches in folders and on the Hub."""

from .method_config import MethodConfig as MethodConfig
from .method_config import option as option
