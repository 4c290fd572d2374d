"""Record how a pipeline calls its denoiser."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tfmq_fx.core.errors import ConfigError, TfmqError
from tfmq_fx.core.inference import ordinary, outside_inference_mode

from .denoisers import chosen_denoisers, copied


class _Called(BaseException):
    """Ends a pipeline's call once its denoiser is called; pipelines do not catch it."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs


@outside_inference_mode
def record_inputs(
    pipeline: Any, *args: Any, component: str | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The arguments, by name, of the first call that a pipeline makes of its denoiser.

    They are example inputs for `prepare`, with all that the pipeline adds: batches for guidance,
    a ControlNet's residuals, an adapter's features and image embeddings, the channels of a mask.

    pipeline: a diffusers pipeline, called with *args and **kwargs and stopped at that call. Neither
    it nor its scheduler, denoiser and generators change, nor torch's random state.
    component: which denoiser, such as "transformer_2"; needed where there are several.
    Tensors keep shape, dtype and device.
    Raises ConfigError where the denoiser is not known, where the pipeline cannot be called with
    these arguments, and where it does not call the denoiser.
    """
    chosen = chosen_denoisers(pipeline, component)
    if len(chosen) > 1:
        raise ConfigError(
            f"this {type(pipeline).__name__} has several denoisers: record_inputs(..., component="
            f"<one of {', '.join(chosen)}>)"
        )
    ((name, module),) = chosen.items()
    own = copied(pipeline)
    setattr(own, name, _stopping(module))
    if hasattr(own, "set_progress_bar_config"):
        own.set_progress_bar_config(disable=True)
    with _random_states(kwargs.get("generator")):
        try:
            call_pipeline(own, *args, **kwargs)
        except _Called as call:
            return call.inputs
    raise ConfigError(
        f"the {type(pipeline).__name__} did not call its {name} in this call: give it more steps "
        "(num_inference_steps=), or other arguments"
    )


def call_pipeline(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
    """What a pipeline returns. Raises ConfigError where it cannot be called with the arguments."""
    try:
        return pipeline(*args, **kwargs)
    except TfmqError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # pipelines check their arguments in many ways
        kind = type(pipeline).__name__
        raise ConfigError(
            f"{kind} cannot be called with these arguments ({type(error).__name__}: "
            f"{str(error).strip()}). Pass what pipe(...) takes itself"
        ) from error


def _stopping(module: nn.Module) -> nn.Module:
    """A shallow copy of a module, with the same tensors, that raises _Called when it is called."""
    own = copy.copy(module)
    own.__dict__["_compiled_call_impl"] = None  # of module.compile()
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        own.__dict__[hooks] = OrderedDict(getattr(module, hooks))
    signature = inspect.signature(module.forward)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: dict[str, Any] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            variable = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            inputs |= value if variable else {name: value}
        raise _Called(tree_map_only(Tensor, ordinary, inputs))

    own.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    return own


@contextlib.contextmanager
def _random_states(generators: Any) -> Iterator[None]:
    """A context at whose end torch's random state and that of `generators` are as they were."""
    given = generators if isinstance(generators, (list, tuple)) else [generators]
    states = [(each, each.get_state()) for each in given if isinstance(each, torch.Generator)]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)
