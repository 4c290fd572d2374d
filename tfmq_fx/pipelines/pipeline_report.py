"""Report what was done to a pipeline, and put its old denoisers back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tfmq_fx.conversion.models import Compiled, Converted
from tfmq_fx.diagnostics.report import Report, report


class PipelineReport(Report):
    """The report on a pipeline whose denoisers were quantized. `str()` is for reading.

    reports: the report on each denoiser, by the name of the component.  data: that of the
    denoiser; where there are several, with the layers, weights and bytes of all.
    models: the converted models, to save; what runs may be compiled.
    pipeline: the pipeline that was given.  replaced: the modules that it had, which `restore` puts
    back.
    """

    def __init__(
        self,
        pipeline: Any,
        models: Mapping[str, Converted],
        placed: Mapping[str, Converted | Compiled],
    ) -> None:
        self.reports = {name: report(model) for name, model in placed.items()}
        super().__init__(_together(self.reports))
        self.models = dict(models)
        self.replaced: dict[str, nn.Module] = {n: getattr(pipeline, n) for n in placed}
        self.pipeline = pipeline
        for name, model in placed.items():
            setattr(pipeline, name, model)

    def restore(self) -> None:
        """Put the modules that the pipeline had back into their places."""
        for name, module in self.replaced.items():
            setattr(self.pipeline, name, module)

    def __str__(self) -> str:
        return "\n\n".join(f"{name}: {each}" for name, each in self.reports.items())


def _together(reports: Mapping[str, Report]) -> dict[str, Any]:
    """The data of one report, or of the first with the layers, weights and bytes of all."""
    parts = {name: each.data for name, each in reports.items()}
    data = dict(next(iter(parts.values())))
    if len(parts) > 1:
        data["sites"] = {f"{n}.{s}": v for n, d in parts.items() for s, v in d["sites"].items()}
        for key in ("bytes", "float_bytes", "left_weights"):
            data[key] = sum(part[key] for part in parts.values())
    return data
