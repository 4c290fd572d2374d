"""Graph rewrites, one per file, and the names that a pass of your own needs.

A pass is a function GraphModule -> Rewrite under `@graph_pass`; `tfmq_fx.conversion.steps` runs
them in order. Passes import no other pass; they may import everything below
`tfmq_fx.conversion.models`.
"""

if __name__ != "tfmq_fx.passes":
    raise ImportError("import this package as tfmq_fx.passes, not as passes")

from tfmq_fx.core.stages import Stage as Stage
from tfmq_fx.ir.graph_pass import Declined as Declined
from tfmq_fx.ir.graph_pass import Rewrite as Rewrite
from tfmq_fx.ir.graph_pass import graph_pass as graph_pass
