"""Convert a calibrated model by an ordered list of steps.

Public face: convert, the steps, refresh, Prepared, Converted, Compiled.

May import: passes, backends, serialization and below.
"""
