"""Provide the arithmetic and the modules of quantization, without any graph.

Public face: affine, gptq, adaround; QuantLinear, QuantConv2d, QuantTimestepTable, BitPlan.

May import: core.
"""
