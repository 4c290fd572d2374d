"""Graphs and models as files, and what they were made from.

Public face: artifact.save, artifact.load, Checkpoint, provenance.

May import: calibration, capture, ir, quant, core.
"""
