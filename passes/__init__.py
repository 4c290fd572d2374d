"""Graph rewrites, one per file, and what a pass of your own is written with.

A pass is a function GraphModule -> Rewrite under `@graph_pass`; `tfmq_fx.steps` runs them in order.
Passes know nothing of one another; they may import everything below `tfmq_fx.modules`.
"""

if __name__ != "tfmq_fx.passes":
    raise ImportError("import this package as tfmq_fx.passes, not as passes")

from ..dialect import Stage as Stage
from ..graph import Declined as Declined
from ..graph import Rewrite as Rewrite
from ..graph import graph_pass as graph_pass
