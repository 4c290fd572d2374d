"""Lower quantized layers to integer kernels, and compile the graph with torch.compile: for the CPU
in `cpu`, for NVIDIA GPUs in `cuda`."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from tfmq_fx.backends.layer_check import Alone
from tfmq_fx.backends.support import CPU
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.ir.graph import device_of, opaque_modules
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.node_info import size_hint

from .compile_cache import with_artifact

TORCH_OPTIONS = ("dynamic", "mode", "options", "disable")  # of torch.compile
OPTIONS = ("trial", "artifact", *TORCH_OPTIONS)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def unavailable(device: torch.device = CPU) -> str | None:
    """Why this machine cannot compile for `device`, or None where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"it compiles for cpu and cuda, the model is on {device.type}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "CUDA kernels need Triton, which is not installed (pip install 'tfmq-fx[cuda]')"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
    except Exception as error:  # Inductor raises its own InvalidCxxCompiler, a private type
        return f"torch.compile needs a C++ compiler and found none ({type(error).__name__})"
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and {compiler!r} is not installed"
    return None


class CpuCallable:
    """A graph compiled for the CPU; inputs of any strides run in the same code.

    freezes: whether constants are folded into the code, which oneDNN's layers need and packed
    weights of floating-point layers gain from. That has to be on while Dynamo traces, which a later
    call with other sizes does too; the setting is entered for the call alone (about 20 us) and
    nothing global stays changed.
    artifact: file for what the compiler made, read before the first call and written after it.
    """

    def __init__(
        self, gm: fx.GraphModule, options: dict[str, Any], *, freezes: bool, artifact: Path | None
    ) -> None:
        if "mode" not in options:  # the graph is our own: its modules and buffers do not change
            unguarded = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            options = {**options, "options": unguarded | (options.get("options") or {})}
        from tfmq_fx.backends.cpu.nans import mark_nans

        self.compiled = mark_nans(_compiled(gm, options), gm)
        self.freezes, self.artifact, self.formats = freezes, artifact, _formats_of(gm)

    def __call__(self, *inputs: Tensor) -> Any:
        from torch._inductor import config

        values = _plain(inputs, self.formats)
        with _apart(), config.patch(freezing=True) if self.freezes else nullcontext():
            if self.artifact is None:
                return self.compiled(*values)
            path, self.artifact = self.artifact, None
            return with_artifact(path, lambda: self.compiled(*values))


class CudaCallable:
    """A graph compiled for CUDA; inputs of any strides run in the same code. Where the mode records
    CUDA graphs, results are copied out of their memory, which the next call overwrites."""

    def __init__(self, gm: fx.GraphModule, options: dict[str, Any]) -> None:
        self.compiled, self.formats = _compiled(gm, options), _formats_of(gm)
        flags = options.get("options") or {}
        recorded = options.get("mode") in ("max-autotune", "reduce-overhead")
        self.copies = recorded or bool(flags.get("triton.cudagraphs"))

    def __call__(self, *inputs: Tensor) -> Any:
        values = _plain(inputs, self.formats)
        with _apart():
            results = self.compiled(*values)
            return tree_map_only(Tensor, Tensor.clone, results) if self.copies else results


class _Eager(nn.Module):
    """An opaque module that torch.compile leaves as it is, between two compiled graphs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.call = torch.compiler.disable(module.__call__)  # a decorator would import Dynamo

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _compiled(gm: fx.GraphModule, options: dict[str, Any]) -> Any:
    """A graph compiled by torch.compile: whole, or around its opaque modules."""
    opaque = opaque_modules(gm)
    for path, module in opaque.items():
        gm.set_submodule(path, _Eager(module))
    return torch.compile(gm, fullgraph=not opaque, **options)


def compile_graph(
    gm: fx.GraphModule,
    *,
    trial: bool | None = None,
    artifact: str | Path | None = None,
    refused: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[CpuCallable | CudaCallable, Rewrite]:
    """Compile a quantized graph; returns a callable and how the graph was lowered.

    trial: whether each layer's kernel is chosen by timing it on this machine, where what is slower
    than bf16 stays in floating point; None does so on CUDA alone.
    artifact: a file for what the compiler makes of the graph on the CPU. Where it is there, the
    first call reads it and compiles nothing that it holds; where it is not, or does not fit this
    model, machine and torch, the first call writes it. It is code: what is in it runs.
    refused: layers whose kernels were found wrong here, and how: they run in floating point.
    options: passed on to torch.compile.
    """
    check_options("inductor", options, OPTIONS)
    device = device_of(gm)  # `unavailable` has passed it
    if device.type == "cpu":
        from tfmq_fx.backends.cpu.autotune import timed_chooser, untimed_choice
        from tfmq_fx.backends.cpu.lower import freezes, lower

        lowered = lower(gm, choose=timed_chooser() if trial else untimed_choice, refused=refused)
        path = None if artifact is None else Path(artifact)
        frozen = freezes(lowered.gm)
        return CpuCallable(lowered.gm, options, freezes=frozen, artifact=path), lowered
    if artifact is not None:
        raise ConfigError("artifact= keeps what is compiled for the CPU; this model is on CUDA")
    from tfmq_fx.backends.cuda.lower import lower as lower_for_cuda

    choose, capability = _on_cuda(device, trial)
    lowered = lower_for_cuda(gm, choose=choose, capability=capability, refused=refused)
    return CudaCallable(lowered.gm, options), lowered


def check_options(name: str, options: dict[str, Any], known: Sequence[str]) -> None:
    """Raise ConfigError naming options that torch.compile does not take here."""
    if unknown := sorted(set(options) - set(TORCH_OPTIONS)):
        raise ConfigError(
            f"backend {name!r} has no option {', '.join(unknown)}; it takes {', '.join(known)}"
        )


def alone(device: torch.device, trial: bool | None = None) -> Alone:
    """A function that returns a single layer on the kernel of this package for `device`, or None
    where something else runs it. trial: see `compile_graph`."""
    if device.type == "cpu":
        from tfmq_fx.backends.cpu.lower import alone as alone_on_cpu

        return alone_on_cpu
    from tfmq_fx.backends.cuda.lower import alone as alone_on_cuda

    choose, capability = _on_cuda(device, trial)
    return lambda layer, node: alone_on_cuda(layer, node, choose, capability)


def _on_cuda(device: torch.device, trial: bool | None) -> tuple[Any, tuple[int, int]]:
    """The chooser of kernels for a GPU, and its compute capability."""
    from tfmq_fx.backends.cuda.autotune import timed_chooser, untimed_choice

    choose = untimed_choice if trial is False else timed_chooser(device)
    return choose, torch.cuda.get_device_capability(device)


def _formats_of(gm: fx.GraphModule) -> list[torch.memory_format]:
    """The memory format of each placeholder of a graph: channels last where it was captured so."""
    formats = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        shape, strides = (tuple(map(size_hint, v)) for v in (value.shape, value.stride()))
        last = _LAST.get(value.dim(), torch.contiguous_format)
        plain = _strides(shape, torch.contiguous_format)
        as_last = strides == _strides(shape, last) and strides != plain
        formats.append(last if as_last else torch.contiguous_format)
    return formats


@contextmanager
def _apart() -> Iterator[None]:
    """A context that turns off gradients and inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _plain(inputs: Sequence[Tensor], formats: Sequence[torch.memory_format]) -> list[Tensor]:
    """The same values as tensors without gradients or inference mode, in the strides that sizes and
    format give: for others torch.compile would make another graph. Copied where needed."""
    with _apart():
        return [_plain_value(value, form) for value, form in zip(inputs, formats, strict=True)]


def _plain_value(value: Tensor, form: torch.memory_format) -> Tensor:
    value = value.clone() if value.is_inference() else value.detach()
    value = value.resolve_conj().resolve_neg().contiguous(memory_format=form)
    strides = _strides(value.shape, form)  # those of sizes of 1 are free, and looked at too
    return value if value.stride() == strides else value.as_strided(value.shape, strides)


def _strides(shape: Sequence[int], form: torch.memory_format) -> tuple[int, ...]:
    """The strides of a new tensor."""
    dims = list(range(len(shape)))
    if form != torch.contiguous_format:
        dims = [0, *dims[2:], 1]
    strides, step = [1] * len(shape), 1
    for dim in reversed(dims):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)
