"""Training and searching what some methods need to know about a model; one module per method."""
