"""Make diffusers know this library's models and quantizer, without importing diffusers."""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tfmq_fx.conversion.diffusers_form import QUANT_METHOD
from tfmq_fx.conversion.graph_model import GraphModel

from .quantization_config import TFMQConfig

_MODELS = ("Prepared", "Converted", "Compiled")  # Bound is a Converted


def register_with_diffusers() -> None:
    """Register now with what of diffusers is imported, and with the rest when it is.

    Then `pipeline.save_pretrained` and `from_pretrained` write and read our models, and
    `from_pretrained` of a diffusers model takes a `TFMQConfig`.
    """
    missing = {name: action for name, action in _ACTIONS.items() if name not in sys.modules}
    for name in _ACTIONS.keys() - missing.keys():
        _ACTIONS[name](sys.modules[name])
    if missing and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(missing))


class TFMQDenoiser(ABC):  # noqa: B024
    """What stands for a denoiser in a pipeline: a model of diffusers, or one of ours.

    Both are registered with it, so that `from_pretrained(folder, unet=ours)` finds ours to be of
    the kind that the folder names.
    """


def _add_models(module: Any) -> None:
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    methods = ["save_pretrained", "from_pretrained"]
    module.LOADABLE_CLASSES["tfmq_fx"] = dict.fromkeys(_MODELS, methods)
    TFMQDenoiser.register(ModelMixin)
    TFMQDenoiser.register(GraphModel)
    namespace: Any = diffusers
    namespace.TFMQDenoiser = TFMQDenoiser  # where diffusers looks for a class of that name
    module.ALL_IMPORTABLE_CLASSES.update(dict.fromkeys((*_MODELS, "TFMQDenoiser"), methods))


def _add_quantizer(module: Any) -> None:
    from .diffusers_quantizer import TFMQQuantizer

    module.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TFMQQuantizer
    module.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TFMQConfig


_ACTIONS: dict[str, Callable[[Any], None]] = {
    "diffusers.pipelines.pipeline_loading_utils": _add_models,
    "diffusers.quantizers.auto": _add_quantizer,
}


class _Finder(MetaPathFinder):
    """Finds modules as the other finders do, and has an action done once one is imported."""

    def __init__(self, actions: dict[str, Callable[[Any], None]]) -> None:
        self._actions, self._searching = dict(actions), False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._actions or self._searching:
            return None
        self._searching = True  # for the others, which are asked now
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, lambda module: self._imported(fullname, module))
        return spec

    def _imported(self, name: str, module: ModuleType) -> None:
        if (action := self._actions.pop(name, None)) is not None:
            action(module)
        if not self._actions and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Loads a module as its own loader does, and then does an action with it."""

    def __init__(self, loader: Any, action: Callable[[ModuleType], None]) -> None:
        self._loader, self._action = loader, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)
