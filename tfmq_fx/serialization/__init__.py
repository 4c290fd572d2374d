"""Save graphs and models as files, and record the source that they were made from.

Public face: artifact.save, artifact.load, Checkpoint, provenance.

May import: calibration, capture, ir, quant, core.
"""
