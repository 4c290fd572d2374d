"""Map this library's classes and functions to their names in saved files.

They are no paths: a class may move to another module, and files that were saved before still load.
A name that was written once stays in the table for good. Torch's own classes, and operators
registered with torch (`torch.ops.tfmq_fx...`), go by the names that torch knows them by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from tfmq_fx.ir.functionalize import inplace_, setitem_
from tfmq_fx.ir.held_values import check_held, checked_sizes
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.low_rank import LowRank
from tfmq_fx.quant.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantLinear,
)
from tfmq_fx.quant.timestep_table import QuantTimestepTable

MODULES: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "LowRank": LowRank,
        "QuantActivation": QuantActivation,
        "QuantConv1d": QuantConv1d,
        "QuantConv2d": QuantConv2d,
        "QuantConv3d": QuantConv3d,
        "QuantConvTranspose1d": QuantConvTranspose1d,
        "QuantConvTranspose2d": QuantConvTranspose2d,
        "QuantConvTranspose3d": QuantConvTranspose3d,
        "QuantLinear": QuantLinear,
        "QuantTimestepTable": QuantTimestepTable,
    }
)
FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "check_held": check_held,
        "checked_sizes": checked_sizes,
        "inplace_": inplace_,
        "setitem_": setitem_,
    }
)
# Their names in formats 3 and 4: where they lay then. Names are only ever looked up here.
OLD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "tfmq_fx.activation.QuantActivation": "QuantActivation",
        "tfmq_fx.effects.inplace_": "inplace_",
        "tfmq_fx.effects.setitem_": "setitem_",
        "tfmq_fx.lowrank.LowRank": "LowRank",
        "tfmq_fx.nn.QuantConv1d": "QuantConv1d",
        "tfmq_fx.nn.QuantConv2d": "QuantConv2d",
        "tfmq_fx.nn.QuantConv3d": "QuantConv3d",
        "tfmq_fx.nn.QuantLinear": "QuantLinear",
        "tfmq_fx.tables.QuantTimestepTable": "QuantTimestepTable",
    }
)
_NAMES: dict[Any, str] = {value: name for name, value in {**MODULES, **FUNCTIONS}.items()}


def saved_name(value: Any) -> str | None:
    """Return the name of one of our classes or functions in saved files; None for another value."""
    return _NAMES.get(value)


def class_name(kind: type) -> str:
    """Return the name of a class in saved files: ours from the table, others' with their module."""
    return saved_name(kind) or f"{kind.__module__}.{kind.__qualname__}"


def is_own(kind: type[nn.Module]) -> bool:
    """Whether a module class is one of ours, which a saved file describes by its `spec()`."""
    return kind in _NAMES
