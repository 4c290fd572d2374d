"""Bind a model to the request: `bind_request`, for converted models and for any denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .api import prepare
from .bound import Bound
from .config import PrologueSpec
from .coverage import parameter_record
from .errors import ConfigError
from .inference import outside_inference_mode
from .modules import Compiled, Converted, Prepared
from .offload import check_offload
from .recall import remember
from .records import ConversionRecord, site_records
from .sites import find_sites, weights_left


@outside_inference_mode
def bind_request(
    model: nn.Module,
    timesteps: Any = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timestep: str | None = None,
    spec: PrologueSpec | None = None,
    **options: Any,
) -> Bound:
    """`model`, with all that the timestep and the conditions fix computed when a request begins.

    What depends on the timestep and on inputs that stay for a whole request (class label, text,
    sizes, guidance) is computed for every step when such an input or the schedule is new, and read
    at the steps; what depends on those inputs alone, once. Values are never stale: inputs are known
    by object and version, or by content.

    model: a converted (and loaded) model, whose quantized layers and tables stay as they are; or
    any denoiser, captured here from example_inputs (as for `prepare`) and left in floating point.
    timesteps: the schedule, as for `Bound.set_timesteps`; left out, timesteps are met as they come.
    options: of a PrologueSpec, in place of `spec`.
    Exact: outputs equal the model's bit for bit, at any batch size, where all samples are at one
    timestep, and up to float reassociation elsewhere.
    Raises ConfigError for options or inputs that cannot be used.
    """
    if spec is not None and options:
        raise ConfigError(f"give a PrologueSpec or {', '.join(options)}, not both")
    if isinstance(model, (Prepared, Compiled)):
        raise ConfigError(
            f"bind_request() takes a converted or a plain model, not a {type(model).__name__}; "
            "bind before compiling"
        )
    if isinstance(model, Converted) and (example_inputs is not None or timestep is not None):
        raise ConfigError("a converted model is not captured again: leave out its example inputs")
    if spec is not None and not isinstance(spec, PrologueSpec):
        raise ConfigError(f"spec must be a PrologueSpec, not a {type(spec).__name__}")
    known = [field.name for field in dataclasses.fields(PrologueSpec)]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"bind_request() has no option {unknown[0]!r}; it has {', '.join(known)}")
    spec = PrologueSpec(**options) if spec is None else spec
    if isinstance(model, Bound):
        model = model.unbound()
    elif not isinstance(model, Converted):
        model = captured_only(prepare(model, example_inputs, timestep=timestep, config="fp"))
    check_offload(spec.offload, model.device)
    bound = Bound(model, spec)
    if timesteps is not None:
        bound.set_timesteps(timesteps)
    return bound


def captured_only(prepared: Prepared) -> Converted:
    """The captured model as a converted one in which nothing is changed."""
    gm = prepared.gm
    origin, watch = remember(prepared, None, calibrated=False, sampled=False)
    sites, declined = find_sites(gm)
    folded = gm.meta.get("capture", {}).get("folded", {})
    record = ConversionRecord(
        capture=gm.meta.pop("capture", {}),
        sites=site_records(gm, {}, {}),
        declined=[[d.site, d.reason] for d in declined],
        left_weights=weights_left(gm, sites),
        parameters=parameter_record(gm, origin, prepared.source, folded),
        float_bytes=prepared.nbytes(),
    )
    return Converted(
        gm,
        prepared.call,
        recipe=prepared.recipe,
        record=record.to_dict(),
        model_config=prepared.model_config,
        origin=origin,
        watch=watch,
    )
