"""Training of routers and ranking of layers for `flux`."""
