"""Lower layers to integer or fp8 codes: the part that the CPU and CUDA lowerings share.

`problem` and `choice` describe one layer's work and what runs it, `arithmetic` defines the numbers,
`layers` the modules, `lower` puts them into a graph, and `fuse` with its siblings rewrites that
graph. An engine, `backends/cpu` or `backends/cuda`, adds a subclass of `CodesLayer`, a group norm
that makes codes, and what chooses its kernels. Nothing here imports an engine.
"""
