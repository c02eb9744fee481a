"""Bridges to other libraries; each loads its library when imported."""
