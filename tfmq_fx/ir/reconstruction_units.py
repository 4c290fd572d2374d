"""Group layers into units that reconstruction optimises together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .graph import module_paths
from .sites import Site
from .subgraphs import region


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers reconstructed together: a residual block, an attention block, or one layer alone.

    path: the module that holds them; equal to the site's own name where it stands alone.
    """

    path: str
    sites: tuple[Site, ...]


def units(sites: Sequence[Site]) -> list[Unit]:
    """The reconstruction units of a graph in execution order.

    Each site goes with the innermost module that holds two or more sites, unless that module also
    holds other units: then the site stands alone (BRECQ's blocks, found by structure, not class).
    """
    holding: dict[str, list[Site]] = {}
    for site in sites:
        for path in _callers(site):
            holding.setdefault(path, []).append(site)
    home = {
        site.name: next((p for p in _callers(site) if len(holding[p]) > 1), site.name)
        for site in sites
    }
    whole = {
        path
        for path in set(home.values())
        if all(home[s.name] == path for s in holding.get(path, ()))
    }
    grouped: dict[str, list[Site]] = {}
    for site in sites:
        path = home[site.name] if home[site.name] in whole else site.name
        grouped.setdefault(path, []).append(site)
    return [Unit(path, tuple(members)) for path, members in grouped.items()]


def unit_nodes(gm: fx.GraphModule, unit: Unit) -> list[fx.Node]:
    """The nodes that a unit's module recorded, in execution order."""
    if len(unit.sites) == 1 and unit.path == unit.sites[0].name:
        return list(unit.sites[0].nodes)
    return region(gm, unit.path)


def _callers(site: Site) -> list[str]:
    """The paths of the modules whose forward called the site, innermost first, without the model.

    Containers that have no forward, such as nn.ModuleList, and modules that hold the parts of a
    split layer are not among them.
    """
    parts = site.name.split(".")[:-1]
    called = module_paths(site.nodes[0])
    enclosing = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return [path for path in enclosing if path in called]
