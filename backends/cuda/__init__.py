"""Lower to int8, fp8 and 4-bit Triton kernels for convolutions and linear layers on CUDA.

Every op has a reference for the CPU in plain torch, which the kernels are tested against; nothing
here needs Triton or a GPU to be imported, except the modules in `kernels`.
"""
