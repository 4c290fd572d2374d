"""Put a range observer in front of every quantizable layer.

y = conv(x)    ->    y = conv(observe(x, t))
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from tfmq_fx.calibration.observers import RangeObserver
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass
from tfmq_fx.ir.layer_edits import layer_input
from tfmq_fx.ir.sites import Site, find_sites

PREFIX = "observers"


def observer_name(site: str) -> str:
    """The path of the observer of a site: unique, and without dots, which would nest modules."""
    return f"{PREFIX}.{site.replace('_', '__').replace('.', '_d')}"


@graph_pass(takes=Stage.CAPTURED, gives=Stage.OBSERVED)
def observe_layers(
    gm: fx.GraphModule,
    observer: Callable[[Site], nn.Module | None] = lambda site: RangeObserver(site.name),
) -> Rewrite:
    """The graph with observers; outputs are unchanged (exactly). A layer called several times
    has one observer.

    observer: makes the module for a site that is called with its input and the timestep (B,), or
    None to leave the site alone.
    """
    sites, declined = find_sites(gm)
    t, changed = timestep_node(gm), 0
    for site in sites:
        module = observer(site)
        if module is None:
            continue
        changed += 1
        gm.add_submodule(observer_name(site.name), module)
        for node in site.nodes:
            x = layer_input(node)
            with gm.graph.inserting_before(node):
                seen = gm.graph.call_module(observer_name(site.name), (x, t))
            seen.meta = {"val": x.meta["val"], "nn_module_stack": node.meta["nn_module_stack"]}
            node.replace_input_with(x, seen)
    return Rewrite(gm, changed, declined)
