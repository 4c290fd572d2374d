"""Check that a model can be captured: not wrapped, not quantized, with all weights loaded."""

from __future__ import annotations

import inspect
from keyword import iskeyword

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from tfmq_fx.core.errors import CaptureError, ConfigError
from tfmq_fx.ir.graph import named_tensors

_INNER = ("_orig_mod", "module", "base_model")  # of torch.compile; DataParallel, EMA, FSDP; peft
_QUANTIZED = ("torch.ao.", "bitsandbytes", "optimum.quanto", "diffusers.quantizers", "torchao")


def check_model(model: object) -> None:
    """Raise ConfigError for a model that cannot be captured, with what to pass instead."""
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
        if type(module).__module__.startswith(_QUANTIZED):
            raise ConfigError(_quantized(path or "the model", type(module)))
        for name, value in {**module._parameters, **module._buffers}.items():
            if value is not None and not is_plain(value):
                raise ConfigError(_quantized(f"{path}.{name}" if path else name, type(value)))
    _check_content(model)


def unwrapped(model: object) -> object:
    """The model inside wrappers such as torch.compile's, or `model` itself."""
    return model.get_submodule(wrapped_at(model)) if isinstance(model, nn.Module) else model


def wrapped_at(model: nn.Module) -> str:
    """The path of the model inside wrappers whose forward names no inputs; "" without wrappers."""
    path = []
    while not forward_parameters(model):
        name = next((n for n in _INNER if isinstance(model._modules.get(n), nn.Module)), None)
        if name is None:
            break
        path.append(name)
        model = model.get_submodule(name)
    return ".".join(path)


def forward_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters of model.forward that can be passed by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def is_plain(value: Tensor) -> bool:
    """Whether the operators of a tensor are torch's own."""
    kind = type(value)
    functions = (Tensor.__torch_function__, nn.Parameter.__torch_function__)
    return isinstance(value, FakeTensor) or (
        kind.__torch_function__ in functions
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def _quantized(where: str, kind: type) -> str:
    """The error message for a layer or tensor of another package."""
    package = kind.__module__.partition(".")[0]
    package = "torch.ao" if kind.__module__.startswith("torch.ao.") else package
    return (
        f"{where} is a {kind.__name__} of {package}, not a layer or tensor of torch's own: prepare "
        f"the model as it was before it was quantized or distributed by {package}"
    )


def _check_content(model: nn.Module) -> None:
    """Raise ConfigError where some weights have no content, but for those that hooks offload, which
    the check of hooks reports."""
    away = [name for name, value in named_tensors(model) if value.is_meta]
    here = [name for name, value in named_tensors(model) if not value.is_meta]
    if away and here and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ConfigError(
            f"{away[0]} is on the meta device, without content, and {here[0]} is not: load all "
            f"weights first"
        )


def check_names(graph: fx.Graph) -> None:
    """Raise CaptureError for a module or tensor whose name a GraphModule cannot have."""
    own = {*dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        parts = str(node.target).split(".")
        if word := next(filter(iskeyword, parts), None):
            raise CaptureError(
                f"{node.target}: {word!r} is a word of Python, and the code of a graph cannot use "
                f"it for a name. Name it otherwise in the model"
            )
        if parts[0] in own:
            raise CaptureError(
                f"{node.target}: a graph has an attribute {parts[0]!r} of its own. Name it "
                f"otherwise in the model, or make the model a part of another module whose forward "
                f"calls it: there it is 'model.{node.target}', say"
            )
