"""Export a lowered graph, convert and compile it with OpenVINO, and call it with tensors."""

from __future__ import annotations

import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tfmq_fx.core.errors import BackendError
from tfmq_fx.ir.graph import fork
from tfmq_fx.ir.subgraphs import extract
from tfmq_fx.quant.timestep_lookup import timestep_row

_KEPT = 4  # compiled models, one for each set of input shapes
_TYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "boolean",
}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}
_NO_RULE = re.compile(r"No conversion rule found for operations: ([^\n]+)")


@dataclass(frozen=True, slots=True)
class Model:
    """A converted graph: the openvino.Model, and the dtypes of the graph's outputs."""

    ported: Any
    dtypes: list[torch.dtype]


class OpenVINOCallable:
    """A lowered graph compiled by OpenVINO.

    Rows of timestep tables are read in torch and are inputs of the model: keys are compared exactly
    (the CPU plugin computes 64-bit integers in 32 bits, and float64 in float32), and an unknown
    timestep raises InputError.  Integers elsewhere in the graph have 32 bits.

    The graph is exported and converted once, with the sizes free that its capture left free, and
    compiled for each set of input shapes, which is faster to run than one model with free sizes;
    the last 4 are kept.  Where that export fails (`free_sizes` is False), export and conversion are
    repeated for each set of shapes.

    Inputs are read where they lie if they are contiguous.  Outputs are new tensors at every call.
    Calls from several threads take turns.
    """

    def __init__(self, gm: fx.GraphModule, settings: dict[str, Any]) -> None:
        import openvino

        self.settings, self.core = settings, openvino.Core()
        self.gm, self.rows = split_rows(gm)
        self.lock = threading.Lock()
        self.compiled: OrderedDict[tuple[torch.Size, ...], Any] = OrderedDict()
        self.model: Model | None = None  # with free sizes
        self.free_sizes = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            values = [*inputs, *self.rows(*inputs)] if self.rows is not None else list(inputs)
        with self.lock:
            request, dtypes = self._request(values)
            held = [  # the plugin takes half precision as float32
                _tensor(value.to(_dtype(port)))
                for value, port in zip(values, request.model_inputs, strict=True)
            ]
            for i, value in enumerate(held):
                request.set_input_tensor(i, value)
            own = self._own_outputs(request)
            request.infer()
            outputs = [
                _copied(request.get_output_tensor(i)) if value is None else value
                for i, value in enumerate(own)
            ]
        return tuple(value.to(dtype) for value, dtype in zip(outputs, dtypes, strict=True))

    def _request(self, values: Sequence[Tensor]) -> tuple[Any, list[torch.dtype]]:
        """The inference request for inputs of these shapes, and the dtypes of its outputs."""
        shapes = tuple(value.shape for value in values)
        if shapes not in self.compiled:
            model = self._model(values)
            compiled = self.core.compile_model(model.ported, "CPU", self.settings)
            self.compiled[shapes] = compiled.create_infer_request(), model.dtypes
            while len(self.compiled) > _KEPT:
                self.compiled.popitem(last=False)
        self.compiled.move_to_end(shapes)
        request: tuple[Any, list[torch.dtype]] = self.compiled[shapes]
        return request

    def _model(self, values: Sequence[Tensor]) -> Model:
        if self.model is None and self.free_sizes:
            try:
                self.model = converted(self.gm, *_free_examples(self.gm, values))
            except BackendError:
                self.free_sizes = False
        if self.model is None:
            return converted(self.gm, values)
        fixed = self.model.ported.clone()  # shares constants
        fixed.reshape({i: list(v.shape) for i, v in zip(fixed.inputs, values, strict=True)})
        return Model(fixed, self.model.dtypes)

    def _own_outputs(self, request: Any) -> list[Tensor | None]:
        """A new tensor for each output, set as its memory; None where the shape is not known."""
        memory: list[Tensor | None] = []
        for i, port in enumerate(request.model_outputs):
            if port.get_partial_shape().is_dynamic:
                memory.append(None)
                continue
            value = torch.empty(list(port.get_shape()), dtype=_dtype(port))
            request.set_output_tensor(i, _tensor(value))
            memory.append(value)
        return memory


def split_rows(gm: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """The graph with a further input for each row of a timestep table, in order; and the graph that
    computes these rows from the inputs, or None where there are none."""
    rows = list(gm.graph.find_nodes(op="call_function", target=timestep_row))
    if not rows:
        return fork(gm), None
    inputs, (output,) = (gm.graph.find_nodes(op=op) for op in ("placeholder", "output"))
    rest = extract(gm, list(output.all_input_nodes), [*inputs, *rows], until=output)
    return rest, extract(gm, rows, list(inputs))


def converted(
    gm: fx.GraphModule, examples: Sequence[Tensor], free: Sequence[dict[int, Any]] | None = None
) -> Model:
    """Export a lowered graph and convert it to OpenVINO.

    free: the dimensions of each input whose sizes stay free; left out, none does.
    Raises BackendError where torch.export fails, and naming operations that OpenVINO does not have.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch import ConversionExtension
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
    from torch.export.decomp_utils import CustomDecompTable

    # What openvino.convert_model does, less its telemetry and what it logs.
    table = CustomDecompTable()
    for operation in ops_to_not_decompose():
        table.pop(operation, None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                gm, tuple(examples), dynamic_shapes=None if free is None else tuple(free)
            ).run_decompositions(table)
            graph = program.module(check_guards=False)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise BackendError(
                f"openvino: torch.export raises {type(error).__name__}: {first}. "
                "Use backend='inductor'."
            ) from error
        front = FrontEndManager().load_by_framework("pytorch")
        front.add_extension(ConversionExtension("tfmq_fx.fake_quantize.default", _fake_quantize))
        decoder = TorchFXPythonDecoder(graph, dynamic_shapes=False)  # free where the graph is
        (output,) = graph.graph.find_nodes(op="output")
        dtypes = [node.meta["val"].dtype for node in output.args[0]]
        try:
            return Model(front.convert(front.load(decoder)), dtypes)
        except Exception as error:
            missing = _NO_RULE.search(str(error))
            what = f"it has no {missing[1]}" if missing else str(error).strip().splitlines()[-1]
            raise BackendError(
                f"openvino cannot convert this model: {what}. Use backend='inductor'."
            ) from error


def _fake_quantize(context: Any) -> Any:
    from openvino import opset15

    scale, zero, top = (context.get_values_from_const_input(i) for i in (1, 2, 3))
    low, high = (np.float32(scale * (code - zero)) for code in (0, top))
    x = context.get_input(0)
    return opset15.fake_quantize(x, low, high, low, high, top + 1).outputs()


def _free_examples(
    gm: fx.GraphModule, values: Sequence[Tensor]
) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Tensors shaped like those of a call, and which of their dimensions the capture left free.

    A free size of 0 or 1 becomes 2: torch.export takes these for fixed.
    """
    from torch.export import Dim

    shapes = [node.meta["val"].shape for node in gm.graph.find_nodes(op="placeholder")]
    known = {
        size.node.expr: max(2, value.shape[i])
        for shape, value in zip(shapes, values, strict=True)
        for i, size in enumerate(shape)
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    }
    examples, free = [], []
    for shape, value in zip(shapes, values, strict=True):
        sizes = [int(s.node.expr.subs(known)) if isinstance(s, torch.SymInt) else s for s in shape]
        examples.append(torch.zeros(sizes, dtype=value.dtype))
        dims = [i for i, size in enumerate(shape) if isinstance(size, torch.SymInt)]
        free.append(dict.fromkeys(dims, Dim.DYNAMIC))
    return examples, free


def _dtype(port: Any) -> torch.dtype:
    return _DTYPES[port.get_element_type().get_type_name()]


def _tensor(value: Tensor) -> Any:
    """An openvino.Tensor on the memory of a torch tensor, or of a contiguous copy."""
    import openvino

    value = value.detach().contiguous()
    kind = getattr(openvino.Type, _TYPES[value.dtype])
    if value.dtype == torch.bfloat16:  # which numpy does not have
        array = value.view(torch.int16).numpy().view(np.uint16)
        return openvino.Tensor(array, openvino.Shape(list(value.shape)), kind)
    return openvino.Tensor(value.numpy(), shared_memory=True)


def _copied(value: Any) -> Tensor:
    return torch.from_numpy(value.data.copy())
