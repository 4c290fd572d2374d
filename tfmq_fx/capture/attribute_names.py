"""Check that modules and tensors have names that the code of a graph can use."""

from __future__ import annotations

from keyword import iskeyword

from torch import fx, nn

from tfmq_fx.core.errors import CaptureError


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
