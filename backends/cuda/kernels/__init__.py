"""The Triton kernels, by kind.

Importing a module of this folder needs Triton: the operators in `cuda.conv` and `cuda.norm` do so
when they are first launched.
"""
