"""Quantize, save and load whole diffusers pipelines, their denoiser among them.

Public face: quantize_pipeline, record_inputs, TFMQConfig.

May import: api and below.
"""
