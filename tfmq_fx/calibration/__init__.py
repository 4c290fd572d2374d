"""Run a model on samples and record what its layers see.

Public face: RangeObserver, SampleCache, SamplingPass, the executor, sample.

May import: capture, ir, quant, core.
"""
