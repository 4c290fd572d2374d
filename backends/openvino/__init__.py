"""Lower to OpenVINO on the CPU."""

from .lower import OPTIONS as OPTIONS
from .lower import compile_graph as compile_graph
from .lower import unavailable as unavailable
