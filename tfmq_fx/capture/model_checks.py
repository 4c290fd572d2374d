"""What a model must be to be captured: not wrapped, not quantized, with its weights in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from tfmq_fx.core.errors import ConfigError

_INNER = ("_orig_mod", "module", "base_model")  # of torch.compile; DataParallel, EMA, FSDP; peft
_QUANTIZED = ("torch.ao.", "bitsandbytes", "optimum.quanto", "diffusers.quantizers", "torchao")


def check_model(model: object) -> None:
    """Raise ConfigError, with what to pass instead, for what no graph can be made of."""
    if not isinstance(model, nn.Module):
        hint = ""
        if hasattr(model, "copy_to") and hasattr(model, "shadow_params"):
            hint = ": copy its weights into the model, with copy_to(model.parameters())"
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"{kind} has no Python code: pass the model that it was scripted from")
    if path := wrapped_at(model):
        raise ConfigError(f"{kind} is a wrapper: pass the model inside, model.{path}")
    for path, module in model.named_modules():
        _check_layer(path, module)
    _check_content(model)


def unwrapped(model: object) -> object:
    """The model inside wrappers such as torch.compile's, or `model` itself."""
    return model.get_submodule(wrapped_at(model)) if isinstance(model, nn.Module) else model


def wrapped_at(model: nn.Module) -> str:
    """The path of the model inside wrappers whose forward names no inputs; "" for no wrapper."""
    path = []
    while not forward_parameters(model):
        name = next((n for n in _INNER if isinstance(model._modules.get(n), nn.Module)), None)
        if name is None:
            break
        path.append(name)
        model = model.get_submodule(name)
    return ".".join(path)


def forward_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of model.forward that can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _check_layer(path: str, module: nn.Module) -> None:
    where, kind = path or "the model", type(module)
    if kind.__module__.startswith(_QUANTIZED):
        raise ConfigError(_quantized(where, kind))
    tensors = {**module._parameters, **module._buffers}
    for name, value in tensors.items():
        if value is not None and not _is_plain(value):
            raise ConfigError(_quantized(f"{path}.{name}" if path else name, type(value)))


def _is_plain(value: Tensor) -> bool:
    """Whether operators on a tensor are torch's own."""
    kind = type(value)
    return isinstance(value, FakeTensor) or (
        kind.__torch_function__ in _PLAIN_FUNCTIONS
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


_PLAIN_FUNCTIONS = (Tensor.__torch_function__, nn.Parameter.__torch_function__)


def _quantized(where: str, kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    package = "torch.ao" if kind.__module__.startswith("torch.ao.") else package
    return (
        f"{where} is a {kind.__name__} of {package}, not a layer or tensor of torch's own: prepare "
        f"the model as it was before it was quantized or distributed by {package}"
    )


def _check_content(model: nn.Module) -> None:
    """Raise ConfigError where some weights have no content; those that a hook keeps elsewhere are
    told where hooks are."""
    tensors = dict(_tensors(model))
    away = next((name for name, value in tensors.items() if value.is_meta), None)
    if away is None:
        return
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    here = next((name for name, value in tensors.items() if not value.is_meta), None)
    if here is not None:
        raise ConfigError(
            f"{away} is on the meta device, without content, and {here} is not: load all weights "
            f"first"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
