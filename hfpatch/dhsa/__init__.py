"""The parts of `dhsa`: boundaries, predictor and its labels, chunk table, choice of tokens, drawing.

A package of its own because the method is four separate ideas that are tested one by one, and because the
calibration and the drawing use them without the method.
"""
