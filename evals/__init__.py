"""Evaluation of patched models: needle in a haystack, latency and memory, the embedded model."""
