"""budget: what limits mean, and what is no limit."""

import math

import pytest

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.quant.budget import Budget, asks_for_time, read_budget


def read(given):
    return read_budget(given, float_bytes=1001, float_micros=500.0)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (1500, Budget(bytes=1500)),
        ("0.3x", Budget(bytes=300)),
        (" .5 X ", Budget(bytes=500)),
        ("900KiB", Budget(bytes=900 * 1024)),
        ("1.5 MB", Budget(bytes=1_500_000)),
        ("12b", Budget(bytes=12)),
        ("8ms", Budget(micros=8000.0)),
        ("70 us", Budget(micros=70.0)),
        ("0.5x time", Budget(micros=250.0)),
        (("0.3x", "8 ms"), Budget(bytes=300, micros=8000.0)),
        ([600, "0.3x"], Budget(bytes=300)),
    ],
)
def test_what_is_meant(given, wanted):
    assert read(given) == wanted
    assert asks_for_time(given) == math.isfinite(wanted.micros)


@pytest.mark.parametrize(
    "given", [0, -5, True, 1.5, "", "x", "0x", "3", "3 hours", "1ms time", "900KiB time", "-1x", []]
)
def test_what_is_no_budget(given):
    with pytest.raises(ConfigError, match=r"budget .*(not understood|empty); give a number of byt"):
        read(given)
