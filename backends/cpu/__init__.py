"""Integer kernels for CPUs, and the lowering to them."""
