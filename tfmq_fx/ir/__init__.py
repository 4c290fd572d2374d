"""The graph: its verifier, the contract of passes, what nodes depend on, where to cut.

Public face: graph_pass, Rewrite, Declined, check, find_sites, binding_times, temporal_block.

May import: quant, core.
"""
