"""Flux: whole layers routed to full or sparse attention, with routers that are trained or layers that are ranked."""

from .method import Flux as Flux
from .method import FluxConfig as FluxConfig
