"""Detect replaced code of a layer: patched forwards, hooks, parametrizations."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize

from .errors import CaptureError
from .padding import functional_widths, padding_widths

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OF_CLASSES = ("forward", "_conv_forward")  # methods in which torch.nn layers compute
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")
_DIFFUSERS = "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(module).remove_hook"


def replaced_forward(layer: nn.Module) -> str | None:
    """The reason why a torch layer does not run its class's forward, or None.

    None for layers of other classes too, whose forward is their own.
    """
    if "forward" in replaced_methods(layer):
        return "its forward was replaced on the instance"
    if type(layer).__module__.startswith("torch.nn.") and not _is_torchs(type(layer).forward):
        return f"the forward of {type(layer).__name__} was replaced"
    return None


def has_hooks(layer: nn.Module) -> bool:
    """Whether forward hooks or pre-hooks are registered on a layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer of torch.nn computes what its class and its settings say.

    False where a method was replaced on the layer or its class, where a weight is computed at each
    call (parametrizations), or where the padding was changed after construction.  Hooks are
    ignored, except those that compute a weight.
    """
    return not (
        bool(replaced_methods(layer))
        or any(not _is_torchs(getattr(type(layer), name, None)) for name in _OF_CLASSES)
        or parametrize.is_parametrized(layer)
        or any(
            type(hook).__module__.startswith("torch.nn.utils.")
            for hook in layer._forward_pre_hooks.values()
        )
        or not _pads_as_made(layer)
    )


def refuse_hooks(model: nn.Module) -> None:
    """Raise CaptureError, with the remedy, for a hook that cannot be captured in a graph.

    These are hooks for all modules of the process, and those that keep state between calls, move
    weights or cast them.
    """
    for hook in (hook for name in _GLOBAL for hook in getattr(_module, name).values()):
        name = getattr(hook, "__qualname__", type(hook).__name__)
        raise CaptureError(
            f"the hook {name} is registered for all modules of this process "
            "(torch.nn.modules.module.register_module_forward_hook or _pre_hook), those of the "
            "converted model too, on whose layers it would act again: call .remove() on the "
            "handle that registering gave, or register it on the modules that it is for"
        )
    for path, part in model.named_modules():
        where = path or "the model"
        registry = vars(part).get("_diffusers_hook")
        for name, hook in getattr(registry, "hooks", {}).items():
            if reason := _obstacle(hook):
                raise CaptureError(f"{where}: its hook {name!r} ({type(hook).__name__}) {reason}")
        accelerate = vars(part).get("_hf_hook")  # one hook, or several in sequence
        for hook in getattr(accelerate, "hooks", (accelerate,)):
            if getattr(hook, "offload", False):
                raise CaptureError(
                    f"{where}: its hook {type(hook).__name__} keeps the weights elsewhere between "
                    "calls. Load them with accelerate.hooks.remove_hook_from_submodules(model), "
                    "or prepare the model before it is offloaded"
                )


def replaced_methods(layer: nn.Module) -> list[str]:
    """The names of the methods that the instance overrides; a restored method does not count."""
    names = []
    for name, value in vars(layer).items():
        own = getattr(type(layer), name, None)
        if callable(value) and callable(own):
            restored = getattr(value, "__func__", None) is own
            if not (restored and getattr(value, "__self__", None) is layer):
                names.append(name)
    return names


def _obstacle(hook: Any) -> str:
    """The reason why a hook of diffusers cannot be captured, with the remedy, or ""."""
    kind = type(hook).__name__
    if kind == "LayerwiseCastingHook":
        return (
            f"stores the weights as {hook.storage_dtype} and casts them at each call. Prepare the "
            "model before apply_layerwise_casting(), or load it anew in the dtype to compute in"
        )
    if "GroupOffload" in kind:
        return (
            "moves the weights at each call. Prepare the model before group offloading is enabled"
            f", or remove it with {_DIFFUSERS}('group_offloading', recurse=True)"
        )
    if getattr(hook, "_is_stateful", False):
        return (
            "keeps values from one call for the next, so one call changes the next. Turn it off "
            f"(model.disable_cache()), or remove it with {_DIFFUSERS}(name)"
        )
    return ""


def _pads_as_made(layer: nn.Module) -> bool:
    """Whether a convolution's precomputed padding, for modes other than zeros, fits `padding`."""
    widths = getattr(layer, "_reversed_padding_repeated_twice", None)
    if widths is None or getattr(layer, "padding_mode", "zeros") == "zeros":
        return True
    sizes: Any = layer
    expected = padding_widths(sizes.padding, sizes.kernel_size, sizes.dilation)
    return tuple(widths) == functional_widths(expected)


def _is_torchs(function: Callable[..., Any] | None) -> bool:
    """Whether a method is the original one of torch, not a wrapper of it."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_TORCH):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
