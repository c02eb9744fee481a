"""Training of the boundary predictor of `dhsa`."""
