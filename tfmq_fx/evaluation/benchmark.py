"""Quantize one model, sample from it, and measure it against full precision."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx import api, backends
from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.capture.capture import capture
from tfmq_fx.conversion.models import Converted, Prepared
from tfmq_fx.core.config import Config
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.temporary_files import folder_of
from tfmq_fx.diagnostics.feature_errors import temporal_errors
from tfmq_fx.diagnostics.report import report
from tfmq_fx.quant.sqnr import OutputSqnr, output_sqnr
from tfmq_fx.serialization import artifact

from .image_quality import Figures, ImageFeatures, extract_features, image_figures, pair_figures
from .subjects import Subject, as_function

STEPS = 20  # DDIM steps
BATCH = 64  # images at a time, calibrated with at least, and paired


def seeds_of(seed: int) -> tuple[int, int]:
    """The seeds of calibration and of sampling for a cell's seed: no two cells share one, and
    nothing is judged on noise that something was calibrated with."""
    return 2 * seed, 2 * seed + 1


class Benchmark:
    """A subject's model, ways to quantize it, and its full-precision trajectories."""

    def __init__(
        self,
        subject: Subject,
        *,
        steps: int = STEPS,
        batch: int = BATCH,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> None:
        """steps: of DDIM.  batch: images at a time.  progress: whether work shows bars."""
        self.subject, self.steps, self.batch, self.progress = subject, steps, batch, progress
        self.device = torch.device(device)
        self.model = subject.load().to(self.device)

    def quantize(
        self,
        config: Config,
        seed: int,
        *,
        overrides: Mapping[str, LayerConfig] | None = None,
        budget: object = None,
    ) -> tuple[Converted, float]:
        """The converted model and the seconds from prepare to convert. Arguments as for
        `calibrated`.  budget: as for `convert`."""
        start = time.perf_counter()
        prepared = self.calibrated(config, seed, overrides=overrides)
        converted = api.convert(prepared, budget=budget, progress=self.progress)
        return converted, time.perf_counter() - start

    def calibrated(
        self, config: Config, seed: int, *, overrides: Mapping[str, LayerConfig] | None = None
    ) -> Prepared:
        """The model prepared and calibrated.

        overrides: as for `prepare`.  seed: of calibration and of what the recipe draws. There are
        as many calibration images as the recipe uses samples of over all steps, in whole batches.
        """
        spec = dataclasses.replace(config.reconstruction, seed=seed)
        config = dataclasses.replace(config, reconstruction=spec)
        example = self.subject.example(self.device)
        prepared = api.prepare(self.model, example, config=config, overrides=overrides)
        images = whole_batches(math.ceil(spec.samples / self.steps), self.batch)
        api.calibrate(
            prepared,
            (self.subject.scheduler(), self.subject.shape),
            num_inference_steps=self.steps,
            samples=images,
            batch_size=self.batch,
            seed=seed,
            progress=self.progress,
            **self.subject.conditions(images),
        )
        return prepared

    def sample(self, model: Callable[..., Tensor], samples: int, seed: int) -> Tensor:
        """Images (samples, channels, height, width) drawn with `model`, as `as_function` returns
        it. Processes share the batches."""
        options = self._sampling(samples, seed)
        images: Tensor = scheduler_sampling.sample(model, progress=self.progress, **options)
        return images

    def trajectory(self, seed: int) -> scheduler_sampling.Trajectory:
        """The inputs and outputs of the model in eager mode while it draws one batch of images."""
        options = self._sampling(self.batch, seed) | {"parallel": False}
        del options["batch_size"]  # all in one
        return scheduler_sampling.record_trajectory(as_function(self.model), **options)[1]

    def _sampling(self, samples: int, seed: int) -> dict[str, Any]:
        return {
            "scheduler": self.subject.scheduler(),
            "shape": (samples, *self.subject.shape),
            "num_inference_steps": self.steps,
            "seed": seed,
            "batch_size": self.batch,
            "device": self.device,
            "conditions": self.subject.conditions(samples),
            "parallel": True,
        }

    def _one_batch(self) -> dict[str, Tensor]:
        """The conditions of one batch, on the device."""
        conditions = self.subject.conditions(self.batch)
        return {name: value.to(self.device) for name, value in conditions.items()}

    def sqnr(self, converted: Converted, trajectory: scheduler_sampling.Trajectory) -> OutputSqnr:
        """Output SQNR of the eager reference on a full-precision trajectory."""
        run, conditions = as_function(converted), self._one_batch()
        outputs = [
            run(x.to(self.device), t.to(self.device), **conditions).cpu()
            for x, t in zip(trajectory.inputs, trajectory.timesteps, strict=True)
        ]
        return output_sqnr(trajectory.outputs, torch.stack(outputs))

    @functools.cached_property
    def graph(self) -> fx.GraphModule:
        """The captured model."""
        return capture(self.model, self.subject.example(self.device), timestep="timestep").gm

    def warm_up(self, model: Callable[..., Tensor]) -> float:
        """Seconds of a first call of `model`, which compiles what has to be compiled."""
        scheduler = self.subject.scheduler()
        scheduler.set_timesteps(self.steps, device=self.device)
        conditions = self._one_batch()
        start = time.perf_counter()
        x = torch.zeros(self.batch, *self.subject.shape, dtype=torch.float32, device=self.device)
        model(x, scheduler.timesteps[0], **conditions)
        return time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Images of one model, their features, and the fields of `Figures` on how they were drawn."""

    images: Tensor
    features: ImageFeatures
    timing: dict[str, Any]


class QualityMeter:
    """Measures quantized models against full precision on one seed."""

    def __init__(
        self,
        bench: Benchmark,
        real: ImageFeatures,
        *,
        seed: int,
        samples: int,
        backend: str = "inductor",
    ) -> None:
        """real: features of the reference images.  samples: in whole batches.  backend: what models
        sample on, where it can compile them."""
        self.bench, self.real, self.samples, self.backend = bench, real, samples, backend
        self.calibration_seed, self.sample_seed = seeds_of(seed)
        self.classifier = bench.subject.classifier()
        self.labels = bench.subject.conditions(samples).get("class_labels")

    @functools.cached_property
    def trajectory(self) -> scheduler_sampling.Trajectory:
        """The trajectory of full precision on the first batch of the images judged."""
        return self.bench.trajectory(self.sample_seed)

    @functools.cached_property
    def reference(self) -> Samples:
        """Full precision's images."""

        def compiled() -> Any:
            backends.backend(self.backend, self.bench.device)
            return torch.compile(self.bench.model)

        return self._draw(self.bench.model, compiled)

    def full_precision(self) -> tuple[Figures, Tensor]:
        """The figures of full precision and its first images."""
        drawn = self.reference
        figures = Figures(
            images=image_figures(drawn.features, self.real, self.labels),
            bytes=sum(p.nbytes for p in self.bench.model.parameters()),
            **drawn.timing,
        )
        return figures, drawn.images[: self.bench.batch]

    def measure(
        self, converted: Converted, seconds: float, *, saved: Path | None = None
    ) -> tuple[Figures, Tensor]:
        """The figures of a converted model and its first images.

        seconds: of its quantization.  saved: the folder that `save` wrote it to; None saves it for
        a moment, to see how large it is.
        """
        facts = report(converted)
        noise = self.bench.sqnr(converted, self.trajectory)
        assert converted.timesteps is not None
        _, errors = temporal_errors(self.bench.graph, converted.gm, converted.timesteps)
        reference = self.reference
        drawn = self._draw(converted, lambda: api.compile(converted, self.backend))
        figures = Figures(
            images=image_figures(drawn.features, self.real, self.labels),
            pairs=pair_figures(reference.images, drawn.images, reference.features, drawn.features),
            sqnr=noise.mean,
            sqnr_pooled=noise.pooled,
            sqnr_by_step=noise.per_step,
            temporal_mean=float(errors.mean()) if errors.numel() else 0.0,
            temporal_worst=float(errors.max()) if errors.numel() else 0.0,
            temporal_by_step=errors.mean(0).tolist() if errors.numel() else None,
            bytes=artifact.saved_bytes(saved) if saved else _saved_bytes(converted),
            weights=facts.weight_coverage,
            inputs=facts.activation_coverage,
            quantize_seconds=seconds,
            **drawn.timing,
        )
        return figures, drawn.images[: self.bench.batch]

    def _draw(self, model: Any, compiled: Callable[[], Any]) -> Samples:
        """All images of `model`, compiled where that works."""
        runner, name, note, first = as_function(model), "eager", None, None
        if self.backend != "eager":
            try:
                attempt = as_function(compiled())
                first = self.bench.warm_up(attempt)
                runner, name = attempt, self.backend
            except Exception as error:  # compilers fail in many ways; eager mode tells a real one
                note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if first is None:
            first = self.bench.warm_up(runner)
        start = time.perf_counter()
        images = self.bench.sample(runner, self.samples, self.sample_seed)
        timing = {
            "compile_seconds": first,
            "sample_seconds": time.perf_counter() - start,
            "backend": name,
            "backend_note": note,
        }
        features = extract_features(self.classifier, images)
        return Samples(images=images, features=features, timing=timing)


def whole_batches(samples: int, batch: int) -> int:
    """`samples` rounded up to whole batches, so that no call has another size and compiles anew."""
    return max(1, math.ceil(samples / batch)) * batch


def _saved_bytes(converted: Converted) -> int:
    folder, remove = folder_of(converted, "saved")
    try:
        api.save(converted, folder / "model")
        return artifact.saved_bytes(folder / "model")
    finally:
        remove()
