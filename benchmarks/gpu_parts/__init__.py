"""The parts of `benchmarks/gpu.py`: what settles on a GPU whether hfpatch is right and fast there."""
