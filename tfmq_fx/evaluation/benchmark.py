"""One model under evaluation: quantized, sampled, and measured against full precision."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx

from tfmq_fx import api, backends
from tfmq_fx.calibration import ddim
from tfmq_fx.capture.capture import capture
from tfmq_fx.conversion.models import Converted, Prepared
from tfmq_fx.core.config import Config
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.temporary_files import folder_of
from tfmq_fx.diagnostics.feature_errors import temporal_errors
from tfmq_fx.diagnostics.report import report
from tfmq_fx.quant import sqnr as sqnr_module
from tfmq_fx.serialization import artifact

from .image_quality import Figures, ImageFeatures, extract_features, image_figures, pair_figures
from .subjects import Subject, called

STEPS = 20  # DDIM steps
BATCH = 64  # images at a time, calibrated with at least, and paired
Stage = Callable[[str], None]


def seeds_of(seed: int) -> tuple[int, int]:
    """Seeds of calibration and of sampling for a cell's seed: no two cells share one, and nothing
    is judged on noise that something was calibrated with."""
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

    def sample(self, runner: Callable[..., Any], samples: int, seed: int) -> Tensor:
        """Images (samples, channels, height, width) drawn with `runner`, a `called` model.
        Processes share the batches."""
        return ddim.sample(
            runner,
            self.subject.scheduler(),
            (samples, *self.subject.shape),
            num_inference_steps=self.steps,
            seed=seed,
            batch_size=self.batch,
            device=self.device,
            conditions=self.subject.conditions(samples),
            progress=self.progress,
            parallel=True,
        )

    def trajectory(self, seed: int) -> ddim.Trajectory:
        """What the model in eager mode sees and answers while it draws one batch of images."""
        _, seen = ddim.record_trajectory(
            called(self.model),
            self.subject.scheduler(),
            (self.batch, *self.subject.shape),
            num_inference_steps=self.steps,
            seed=seed,
            device=self.device,
            conditions=self.subject.conditions(self.batch),
        )
        return seen

    def sqnr(self, converted: Converted, seen: ddim.Trajectory) -> sqnr_module.OutputSqnr:
        """Output SQNR of the eager reference on a full-precision trajectory."""
        run = called(converted)
        given = self.subject.conditions(self.batch)
        conditions = {name: value.to(self.device) for name, value in given.items()}
        outputs = [
            run(x.to(self.device), t.to(self.device), **conditions).cpu()
            for x, t in zip(seen.inputs, seen.timesteps, strict=True)
        ]
        return sqnr_module.output_sqnr(seen.outputs, torch.stack(outputs))

    @functools.cached_property
    def graph(self) -> fx.GraphModule:
        """The captured model."""
        return capture(self.model, self.subject.example(self.device), timestep="timestep").gm

    def warm_up(self, runner: Callable[..., Any]) -> float:
        """Seconds of a first call of `runner`, which compiles what has to be compiled."""
        scheduler = self.subject.scheduler()
        scheduler.set_timesteps(self.steps, device=self.device)
        given = self.subject.conditions(self.batch)
        conditions = {name: value.to(self.device) for name, value in given.items()}
        start = time.perf_counter()
        x = torch.zeros(self.batch, *self.subject.shape, dtype=torch.float32, device=self.device)
        runner(x, scheduler.timesteps[0], **conditions)
        return time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Images of one model, and how they came about."""

    images: Tensor
    seen: ImageFeatures
    compile_seconds: float
    sample_seconds: float
    backend: str
    backend_note: str | None


class QualityMeter:
    """Figures of quantized models against full precision on one seed."""

    def __init__(
        self,
        bench: Benchmark,
        real: ImageFeatures,
        *,
        seed: int,
        samples: int,
        backend: str = "inductor",
    ) -> None:
        """real: what the classifier makes of the reference images.  samples: in whole batches.
        backend: what models sample on, where it can compile them."""
        self.bench, self.real, self.samples, self.backend = bench, real, samples, backend
        self.calibration_seed, self.sample_seed = seeds_of(seed)
        self.classifier = bench.subject.classifier()
        self.labels = bench.subject.conditions(samples).get("class_labels")

    @functools.cached_property
    def trajectory(self) -> ddim.Trajectory:
        """Of full precision, on the first batch of the images judged."""
        return self.bench.trajectory(self.sample_seed)

    @functools.cached_property
    def reference(self) -> Drawn:
        """Full precision's images."""
        model = self.bench.model

        def compiled() -> Any:
            backends.backend(self.backend, self.bench.device)
            return torch.compile(model)

        return self._drawn(model, compiled)

    def full_precision(self) -> tuple[Figures, Tensor]:
        """Its figures and its first images."""
        drawn = self.reference
        figures = Figures(
            images=image_figures(drawn.seen, self.real, self.labels),
            bytes=sum(p.nbytes for p in self.bench.model.parameters()),
            compile_seconds=drawn.compile_seconds,
            sample_seconds=drawn.sample_seconds,
            backend=drawn.backend,
            backend_note=drawn.backend_note,
        )
        return figures, drawn.images[: self.bench.batch]

    def judge(
        self,
        converted: Converted,
        seconds: float,
        stage: Stage = lambda _: None,
        *,
        saved: Path | None = None,
    ) -> tuple[Figures, Tensor]:
        """Figures of a converted model and its first images.

        seconds: of its quantization.  stage: told what is being done.  saved: where it lies as
        `save` wrote it; None saves it for a moment, to see how large it is.
        """
        stage("measuring")
        size = artifact.saved_bytes(saved) if saved else _saved_bytes(converted)
        facts = report(converted)
        noise = self.bench.sqnr(converted, self.trajectory)
        assert converted.timesteps is not None
        _, errors = temporal_errors(self.bench.graph, converted.gm, converted.timesteps)
        reference = self.reference
        stage("sampling")
        drawn = self._drawn(converted, lambda: api.compile(converted, self.backend))
        pairs = pair_figures(reference.images, drawn.images, reference.seen, drawn.seen)
        figures = Figures(
            images=image_figures(drawn.seen, self.real, self.labels),
            pairs=pairs,
            sqnr=noise.mean,
            sqnr_pooled=noise.pooled,
            sqnr_by_step=noise.per_step,
            temporal_mean=float(errors.mean()) if errors.numel() else 0.0,
            temporal_worst=float(errors.max()) if errors.numel() else 0.0,
            temporal_by_step=errors.mean(0).tolist() if errors.numel() else None,
            bytes=size,
            weights=facts.weight_coverage,
            inputs=facts.activation_coverage,
            quantize_seconds=seconds,
            compile_seconds=drawn.compile_seconds,
            sample_seconds=drawn.sample_seconds,
            backend=drawn.backend,
            backend_note=drawn.backend_note,
        )
        return figures, drawn.images[: self.bench.batch]

    def _drawn(self, model: Any, compiled: Callable[[], Any]) -> Drawn:
        """All images of `model`, compiled where that works."""
        runner, name, note = called(model), "eager", None
        if self.backend != "eager":
            try:
                attempt = called(compiled())
                first = self.bench.warm_up(attempt)
                runner, name = attempt, self.backend
            except Exception as error:  # compilers fail in many ways; eager mode tells a real one
                note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if name == "eager":
            first = self.bench.warm_up(runner)
        start = time.perf_counter()
        images = self.bench.sample(runner, self.samples, self.sample_seed)
        seconds = time.perf_counter() - start
        return Drawn(
            images=images,
            seen=extract_features(self.classifier, images),
            compile_seconds=first,
            sample_seconds=seconds,
            backend=name,
            backend_note=note,
        )


def whole_batches(samples: int, batch: int) -> int:
    """`samples` rounded up, so that no call has another size and compiles again."""
    return max(1, math.ceil(samples / batch)) * batch


def free() -> None:
    """Let go of what was compiled and of cycles that hold tensors."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _saved_bytes(converted: Converted) -> int:
    folder, remove = folder_of(converted, "saved")
    try:
        api.save(converted, folder / "model")
        return artifact.saved_bytes(folder / "model")
    finally:
        remove()
