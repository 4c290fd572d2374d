"""diffusers knows our models whichever is imported first, and is not imported for that."""

import subprocess
import sys

import pytest

pytest.importorskip("diffusers")

CHECK = """
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
assert AUTO_QUANTIZATION_CONFIG_MAPPING["tfmq"] is tfmq_fx.TFMQConfig
assert AUTO_QUANTIZER_MAPPING["tfmq"].__name__ == "TFMQQuantizer"
assert "Converted" in LOADABLE_CLASSES["tfmq_fx"] and "Converted" in ALL_IMPORTABLE_CLASSES
assert not [f for f in sys.meta_path if type(f).__module__.startswith("tfmq_fx")]
"""
ORDERS = {
    "ours first": """
import tfmq_fx
assert not [name for name in sys.modules if name.split(".")[0] == "diffusers"]
import importlib.util
import diffusers
assert importlib.util.find_spec("diffusers.quantizers.auto")  # a look is no import
""",
    "diffusers first": "import diffusers, tfmq_fx",
    "all of diffusers first": "import diffusers.quantizers.auto, diffusers.pipelines, tfmq_fx",
}


@pytest.mark.parametrize("order", ORDERS)
def test_models_and_quantizer_are_registered(order):
    script = f"import sys\n{ORDERS[order]}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
