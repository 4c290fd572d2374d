"""Decides on the ordered list of steps that quantize a model, and runs it.

Public face: convert, the steps, refresh, Prepared, Converted, Compiled.

May import: passes, backends, serialization and below.
"""
