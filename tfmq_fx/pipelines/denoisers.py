"""Find the denoisers among a pipeline's components, and copy pipelines around others."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from typing import Any, cast

from torch import nn

from tfmq_fx.capture.call_inference import TIMESTEP_NAMES
from tfmq_fx.capture.model_checks import forward_parameters, unwrapped
from tfmq_fx.conversion.graph_model import GraphModel
from tfmq_fx.core.errors import ConfigError

# unet, transformer_2, unconditional_transformer, prior, prior_prior, super_res_first, ...
_NAMES = re.compile(r"(.*_)?(unet|transformer|prior|decoder|super_res_(first|last))(_\d+)?")


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by the names of their components, in the pipeline's order.

    These are the modules that are called unet, transformer, prior, decoder or super_res_first or
    _last, with or without a number or another word, and whose forward takes a timestep.
    Raises ConfigError where `pipeline` is no pipeline, is made of other pipelines, or has none.
    """
    if not isinstance(getattr(pipeline, "components", None), dict):
        raise ConfigError(
            f"a diffusers pipeline is needed, got {type(pipeline).__name__}. For a denoiser alone "
            "use prepare(), calibrate() and convert()"
        )
    kind, components = type(pipeline).__name__, pipeline.components
    inner = [name for name, part in vars(pipeline).items() if hasattr(part, "components")]
    if inner:
        raise ConfigError(
            f"a {kind} only calls other pipelines: quantize each of these, "
            f"{', '.join(f'pipe.{name}' for name in inner)}"
        )
    found = {
        name: part
        for name, part in components.items()
        if isinstance(part, nn.Module) and _NAMES.fullmatch(name) and _takes_timestep(part)
    }
    if not found:
        raise ConfigError(f"this {kind} has no denoiser (components: {', '.join(components)})")
    return found


def chosen_denoisers(
    pipeline: Any, component: str | Collection[str] | None
) -> dict[str, nn.Module]:
    """The denoisers that `component` names, or all of them for None; none of them quantized.

    Wrappers such as torch.compile's are taken off.
    Raises ConfigError as `denoisers` does, and for a name that is none of theirs.
    """
    found, kind = denoisers(pipeline), type(pipeline).__name__
    names = [component] if isinstance(component, str) else [*(component or found)]
    if unknown := [name for name in names if name not in found]:
        raise ConfigError(
            f"component={unknown[0]!r} is no denoiser of this {kind}; it has {', '.join(found)}"
        )
    for name in names:
        if isinstance(found[name], GraphModel):
            raise ConfigError(
                f"pipe.{name} is a {type(found[name]).__name__} of tfmq_fx already: put the "
                f"original back first (pipe.{name} = ...)"
            )
    return {name: cast(nn.Module, unwrapped(found[name])) for name in names}


def copied(pipeline: Any) -> Any:
    """A shallow copy of a pipeline, whose attributes are its own, with copies of the schedulers.

    A call of it changes neither `pipeline` nor its schedulers; the other components are shared.
    """
    own = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        if hasattr(part, "step") and hasattr(part, "set_timesteps"):
            setattr(own, name, copy.deepcopy(part))
    return own


def _takes_timestep(module: nn.Module) -> bool:
    names = forward_parameters(cast(nn.Module, unwrapped(module)))
    times = (name for name in names if name in TIMESTEP_NAMES or "timestep" in name)
    return isinstance(module, GraphModel) or any(times)
