"""The code that torch.compile would run on a CUDA device, generated on a machine that has none.

Tensors are fake ones on "cuda", and what torch and Triton ask of the device is answered as an H200
would. Reaches into torch's internals, as they are in torch 2.13.
"""

from __future__ import annotations

import contextlib
import types
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, tracing
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    total_memory=140 << 30,
)


class _Driver(CudaDriver):
    """What Triton asks about a device before it compiles for it."""

    def __init__(self):
        pass

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def generated_code(gm, inputs):
    """The Python code that Inductor writes for a graph on CUDA. gm: gets fake tensors."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def on_cuda(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    gm.recompile()
    with mode:
        arguments = tuple(on_cuda(x) for x in inputs)
        for module in gm.modules():
            for tensors in (module._buffers, module._parameters):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = on_cuda(tensor.detach())
            module._buffers |= {n: p for n, p in module._parameters.items() if p is not None}
            for name in [n for n, p in module._parameters.items() if p is not None]:
                del module._parameters[name]
    with mock.patch.object(triton.runtime.driver, "_active", _Driver()):
        with torch.no_grad(), mode, _methods_without_device():
            table = select_decomp_table()
            made, _ = aot_export_module(gm, arguments, trace_joint=False, decompositions=table)
        values = [node.meta["val"] for node in made.graph.find_nodes(op="placeholder")]
        with contextlib.ExitStack() as stack:
            for context in (
                *_answers(),
                mode,
                V.set_fake_mode(mode),
                tracing(TracingContext(mode)),
                V.set_debug_handler(DebugContext()),
            ):
                stack.enter_context(context)
            post_grad_passes(made, True)
            graph = GraphLowering(made, shape_env=mode.shape_env, example_inputs=values)
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*values)
                return graph.codegen()[0].value


def _answers():
    """What a machine with an H200 answers."""
    cuda = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda *device: H200,
        "get_device_capability": lambda *device: (9, 0),
        "synchronize": lambda *device: None,
    }
    for name, answer in cuda.items():
        yield mock.patch.object(torch.cuda, name, answer)
    yield mock.patch.object(torch.version, "cuda", "13.0")
    yield mock.patch("torch._inductor.scheduler.has_triton", lambda: True)
    of_device = staticmethod(lambda device=None: H200)
    yield mock.patch.object(CudaInterface.Worker, "current_device", staticmethod(lambda: 0))
    yield mock.patch.object(CudaInterface.Worker, "get_device_properties", of_device)
    yield mock.patch.object(CudaInterface, "get_device_properties", of_device)
    ninety = staticmethod(lambda device=None: 90)
    yield mock.patch.object(CudaInterface, "get_compute_capability", ninety)


@contextlib.contextmanager
def _methods_without_device():
    """Tensor methods that ask a CPU build of torch for CUDA, written as operators that do not."""
    aten = torch.ops.aten

    def contiguous(x, memory_format=torch.contiguous_format):
        done = x.is_contiguous(memory_format=memory_format)
        return x if done else aten.clone(x, memory_format=memory_format)

    def to(x, *given, **named):
        kinds = [a if isinstance(a, torch.dtype) else getattr(a, "dtype", None) for a in given]
        dtype = next((k for k in [named.get("dtype"), *kinds] if k is not None), x.dtype)
        return x if dtype == x.dtype else aten._to_copy(x, dtype=dtype)

    def item(x, index):
        index = index if isinstance(index, tuple) else (index,)
        if any(i is Ellipsis for i in index):
            at = next(k for k, i in enumerate(index) if i is Ellipsis)
            rest = x.dim() - sum(i is not None and i is not Ellipsis for i in index)
            index = (*index[:at], *[slice(None)] * rest, *index[at + 1 :])
        dim = 0
        for i in index:
            if i is None:
                x = x.unsqueeze(dim)
            elif isinstance(i, int):
                x = aten.select(x, dim, i)
                continue
            elif isinstance(i, torch.Tensor):
                x = aten.index(x, [None] * dim + [i])
            elif i != slice(None):
                x = aten.slice(x, dim, i.start, i.stop, i.step or 1)
            dim += 1
        return x

    written = {
        "contiguous": contiguous,
        "to": to,
        "float": lambda x: to(x, torch.float32),
        "__getitem__": item,
    }
    with contextlib.ExitStack() as stack:
        for name, method in written.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        yield
