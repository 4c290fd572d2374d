"""From an nn.Module to a graph, proved by replay; and how the graph is called.

Public face: capture, Captured, CallSpec.

May import: ir, quant, core.
"""
