"""These tests need Triton, but no GPU and not its interpreter."""

import importlib.util
import os

import pytest

collect_ignore = (
    [] if importlib.util.find_spec("triton") else ["test_machine_code.py", "test_generated_code.py"]
)


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.triton)
