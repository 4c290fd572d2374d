"""Graph rewrites, one per file, and what a pass of your own is written with.

A pass is a function GraphModule -> Rewrite under `@graph_pass`; `tfmq_fx.conversion.steps` runs
them in order. Passes know nothing of one another; they may import everything below
`tfmq_fx.conversion.models`.
"""

if __name__ != "tfmq_fx.passes":
    raise ImportError("import this package as tfmq_fx.passes, not as passes")

from tfmq_fx.core.stages import Stage as Stage
from tfmq_fx.ir.graph_pass import Declined as Declined
from tfmq_fx.ir.graph_pass import Rewrite as Rewrite
from tfmq_fx.ir.graph_pass import graph_pass as graph_pass
