"""These tests need Triton's interpreter, which is chosen when Triton is imported."""

import os

import pytest


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.triton)
