"""Report what was done to a model, layer by layer and feature by feature, as data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfmq_fx.conversion.models import Compiled, Converted
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.prologue.bound_model import Bound
from tfmq_fx.quant.bit_plan import BitPlan


class Report:
    """The report on a converted model. `str()` is for reading, `data` for programs."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    @property
    def weight_coverage(self) -> float:
        """The share of convolution and linear weights in the graph that are quantized, where those
        that no pass can quantize count too."""
        sites = self.data["sites"].values()
        total = sum(s["weights"] for s in sites) + self.data.get("left_weights", 0)
        return sum(s["weights"] for s in sites if s["weight_bits"]) / total if total else 0.0

    @property
    def activation_coverage(self) -> float:
        """The share of convolution and linear layers in the graph whose input is quantized."""
        sites = self.data["sites"].values()
        return sum(s["act_bits"] is not None for s in sites) / len(sites) if sites else 0.0

    def __str__(self) -> str:
        middle = [*self._temporal(), *self._prologue()]
        end = [*self._steps(), *self._passes()]
        return "\n".join([*self._head(), "", *middle, "", *self._sites(), "", *end])

    def _head(self) -> list[str]:
        d = self.data
        capture = d["capture"]
        guards = "; ".join(capture.get("guards", [])) or "none"
        interpolated = ""
        if count := d.get("interpolated", 0):
            interpolated = f" ({count} between those of calibration: scales interpolated)"
        lines = [
            f"recipe {d['recipe']}: {d['bytes'] / 1024:.1f} KiB, "
            f"float {d['float_bytes'] / 1024:.1f} KiB "
            f"({d['float_bytes'] / max(d['bytes'], 1):.2f}x smaller)",
            f"captured by {capture.get('route', '?')} in {capture.get('seconds', 0):.1f} s, "
            f"{capture.get('nodes', 0)} nodes; guards: {guards}",
            *(f"  {note}" for note in capture.get("notes", [])),
            f"timesteps: {d['timesteps']}{interpolated}{_met(d)}",
            f"coverage: {100 * self.weight_coverage:.1f} % of weights, "
            f"{100 * self.activation_coverage:.1f} % of layer inputs are quantized",
        ]
        if (counts := d.get("parameters")) is not None:
            lines.append(
                f"parameters of the model: {counts['model']:,}: {counts['quantized']:,} quantized, "
                f"{counts['float']:,} in floating point, {counts['tables']:,} replaced by tables, "
                f"{counts['unused']:,} unused; constants of the graph: {counts['constants']:,}"
            )
        samples = d.get("samples", {"used": 0})
        if samples["used"] and samples["used"] < samples["asked"]:
            lines.append(
                f"calibration gave {samples['used']} samples, where the recipe takes up to "
                f"{samples['asked']}; calibrate with more (samples=, more calls) for as many"
            )
        if (bits := d.get("bits")) is not None:
            plan = BitPlan.from_dict(bits)
            lines.append(
                f"bits chosen for {plan.budget}: {plan.shares()} "
                f"({plan.sqnr:.1f} dB by the measured noises)"
            )
        if merged := capture.get("merged", {}):
            first, twin = next(iter(merged.items()))
            lines.append(f"merged with equal ones: {len(merged)} layers ({first} with {twin}, ...)")
        if (compiled := d.get("compiled")) is not None:
            checked = compiled["check"] or "not compared with the reference"
            lines.append(f"backend {compiled['backend']}: {checked}")
            lines += [f"  {site}: {why}" for site, why in compiled["declined"]]
        return lines + [f"  left in floating point: {site}: {why}" for site, why in d["declined"]]

    def _temporal(self) -> list[str]:
        block, temporal = self.data["block"], self.data["temporal"]
        lines = [
            f"temporal information block: {len(block['features'])} features, "
            f"{temporal.get('parameters', 0)} parameters in {len(block['modules'])} layers "
            f"(shared: {', '.join(block['shared']) or 'none'})"
        ]
        if temporal.get("exact_fits"):
            lines.append("  exact rows of every feature fit the budget: the block was not learnt")
        for name, feature in temporal.get("features", {}).items():
            others = ", ".join(
                f"{form} {c['error']:.2g}/{c['bytes']} B"
                for form, c in feature["candidates"].items()
            )
            error, weighed = feature["error"], feature["candidates"][feature["chosen"]]["error"]
            when = "" if error == weighed else f" after later passes, chosen at {weighed:.2g}"
            lines.append(f"  {name}: {feature['chosen']} (error {error:.2g}{when}; {others})")
        return lines

    def _prologue(self) -> list[str]:
        prologue = self.data.get("prologue")
        if prologue is None:
            return []
        lines = [
            "",
            f"prologue: {prologue['freed_bytes'] / 1024:.1f} KiB of weights that no step reads "
            f"(offload: {prologue['offload']})",
        ]
        for part in prologue["parts"]:
            what = ", ".join(part["conditions"]) or "the timestep alone"
            when = "a step" if part["stepped"] else "a request"
            lines.append(
                f"  {what}: {len(part['values'])} values, {part['bytes'] / 1024:.1f} KiB for "
                f"{when} and sample; {part['kept']} kept ({part['kept_bytes'] / 1024:.1f} KiB)"
            )
            if part["interpolated"]:
                lines.append(f"    {part['interpolated']} ranges interpolated for new timesteps")
        return lines + [
            f"  computed at every step: {site}: {why}" for site, why in prologue["declined"]
        ]

    def _sites(self) -> list[str]:
        lines = ["layers (weight bits / activation bits / ranges / bytes):"]
        for name, s in self.data["sites"].items():
            weights, acts = (_number(s, side) for side in ("weight", "act"))
            groups = f", {s['weight_groups']} groups" if s.get("weight_groups", 1) > 1 else ""
            why = s.get("reference_only")
            kernel = f"; reference only: {why}" if why else ""
            more = f", {s['interpolated']} ranges interpolated" if s["interpolated"] else ""
            lines.append(
                f"  {name}: {s['kind']} {weights} / {acts} / {s['ranges']} / "
                f"{s['bytes']}{groups}{more}{kernel}"
            )
        for name, p in self.data.get("products", {}).items():
            lines.append(
                f"  {name}: product operand, {p['bits']} bits, {p['grid']}; reference only"
            )
        return lines

    def _steps(self) -> list[str]:
        lines = ["steps:"]
        for step in self.data.get("steps", []):
            done = f"{step['seconds']:.1f} s, {step['guarantee']}"
            left = f"left out, {step['skipped']}"
            lines.append(f"  {step['name']}: {left if step['skipped'] else done}")
        return lines if len(lines) > 1 else []

    def _passes(self) -> list[str]:
        lines = ["passes:"]
        for p in self.data["passes"]:
            lines.append(f"  {p['name']}: {p['changed']} changed, {p['seconds']:.1f} s")
            lines += [f"    left {site}: {why}" for site, why in p["declined"]]
        return lines


def _met(data: Mapping[str, Any]) -> str:
    """The timesteps of calls that the model was not made for, in words."""
    met = data.get("unvisited")
    if not met or not met["timesteps"]:
        return ""
    how = f"ranges of {met['interpolated']} interpolated, " if met["interpolated"] else ""
    return f"; {met['timesteps']} more met in calls ({how}features computed)"


def _number(site: Mapping[str, Any], side: str) -> str:
    """The bits of a layer's weights or inputs, or "fp8" or "float"."""
    if site.get(f"{side}_format") == "fp8":
        return "fp8"
    return str(site[f"{side}_bits"] or "float")


def _unvisited(model: Converted | Compiled) -> dict[str, int] | None:
    """How many timesteps calls have added to a model, and how many have interpolated ranges."""
    if isinstance(model, Compiled):
        return None
    return {
        "timesteps": len(model.unvisited.met),
        "interpolated": model.unvisited.interpolated,
    }


def report(model: Converted | Compiled) -> Report:
    """The report on what was done to `model`, and why not elsewhere."""
    if not isinstance(model, (Converted, Compiled)):
        raise ConfigError(f"report() takes a converted model, not a {type(model).__name__}")
    keys = model.timesteps
    span = "none" if keys is None else f"{len(keys)} from {keys[0].item()} to {keys[-1].item()}"
    compiled = None
    if isinstance(model, Compiled):
        check = model.check
        compiled = {
            "backend": model.backend,
            "check": None if check is None else str(check),
            "steps": [] if check is None else [dataclasses.asdict(step) for step in check.steps],
            "declined": model.declined,
        }
    return Report(
        {
            "recipe": model.recipe.name,
            "bytes": model.nbytes(),
            "timesteps": span,
            "unvisited": _unvisited(model),
            "compiled": compiled,
            "prologue": model.prologue.summary() if isinstance(model, Bound) else None,
            **model.record,
        }
    )
