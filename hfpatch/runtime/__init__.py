"""All that knows Transformers: which layers there are, their raw calls and caches, and the path of a call."""
