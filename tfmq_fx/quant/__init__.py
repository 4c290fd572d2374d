"""The arithmetic and the modules of quantization; knows no graph.

Public face: affine, gptq, adaround; QuantLinear, QuantConv2d, QuantTimestepTable, BitPlan.

May import: core.
"""
