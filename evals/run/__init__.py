"""A run: models, variants, cells, their journal and results."""
