"""Pipelines of diffusers, a tiny one of random weights for each family, and how each is called.

`PIPELINES[name]()` gives (pipe, arguments of its call): two steps, images of some 16 pixels. Text
encoders are left out where the pipeline takes embeddings. `written(pipe, folder)` is the same
pipeline as save_pretrained and from_pretrained leave it.
"""

from . import transformers, unets, videos  # noqa: F401  # they enter their pipelines
from .parts import PIPELINES as PIPELINES
from .parts import with_text as with_text
from .parts import written as written
