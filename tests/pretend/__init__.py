"""A GPU that is none: tensors that say "cuda:0" and compute on the CPU, so that operations and waits can be counted.

FakeTensorMode has no values and stops at the first number read from a tensor; here such code runs to its end.
"""
