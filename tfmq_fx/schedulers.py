"""Samplers that add less noise where a quantized model's estimate brings its own (PTQD)."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, InputError
from .modules import Compiled, Converted

_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")  # DDPM's that no model predicts
_TINY = 1e-12  # for a signal of 0, at zero terminal SNR


def correct_scheduler(scheduler: Any, model: Converted | Compiled) -> Any:
    """A copy of a stochastic scheduler that adds as much less noise as `model` brings; the given
    one stays as it is.

    scheduler: diffusers' DDPMScheduler, or its DDIMScheduler, called with eta > 0.  model: made
    with correction="noise", which measured the variance var[t] left in its output.  The noise added
    at t then has variance max(sigma^2 - c^2 var[t], 0), with c the derivative of the next sample by
    the model's output; where the scheduler clips the predicted sample, c is that of each value.
    Under classifier-free guidance more noise is left than that of one output; only that is taken.

    The copy passes for its original's class: it is saved, and made again from its config, as a
    plain scheduler, since the variances belong to the model.  A pipeline that makes its scheduler
    from the config of the one it is given (DDIMPipeline) gets the copy as `pipe.scheduler = ...`.
    Raises ConfigError for other schedulers, settings that leave c open, and other models.
    """
    variance = _leftover(model)
    kind = type(scheduler)
    base = kind.plain if issubclass(kind, _Corrected) else kind
    mixin = _MIXINS.get(base.__name__)
    if mixin is None or not base.__module__.startswith("diffusers."):
        raise ConfigError(
            f"correct_scheduler() takes diffusers' DDPMScheduler or DDIMScheduler, not "
            f"{kind.__name__}: how much noise it adds, or how, is not known here"
        )
    config = scheduler.config
    if config.thresholding:
        raise ConfigError(
            f"{base.__name__} with thresholding=True: what a dynamic threshold leaves of the "
            "noise is not known"
        )
    if base.__name__ == "DDPMScheduler" and config.variance_type not in _VARIANCES:
        raise ConfigError(
            f"DDPMScheduler with variance_type={config.variance_type!r}: only the noise of "
            f"{', '.join(_VARIANCES)} can be corrected"
        )
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ConfigError(
            f"{base.__name__} with prediction_type={config.prediction_type!r}: how its output "
            "enters the next sample is not known"
        )
    return _corrected(base, dict(copy.deepcopy(vars(scheduler))), variance)


def _leftover(model: Any) -> dict[float, float]:
    """The variance of the noise in the output of `model`, by timestep."""
    if not isinstance(model, (Converted, Compiled)):
        raise ConfigError(
            f"correct_scheduler() takes a model that convert(), load() or compile() returned, not "
            f"a {type(model).__name__}"
        )
    passes = [p for p in model.record.get("passes", ()) if p["name"] == "correct_outputs"]
    details = passes[-1]["details"] if passes else {}
    if details.get("kind") != "noise":
        raise ConfigError(
            f"the model was made with correction={details.get('kind', 'none')!r}, which measures "
            "no noise for correct_scheduler(); convert it with Config(correction='noise')"
        )
    if "variance" not in details:
        reasons = "; ".join(reason for _, reason in passes[-1]["declined"])
        raise ConfigError(f"the noise of the model's output is not known: {reasons}")
    assert model.timesteps is not None
    return dict(zip(map(float, model.timesteps.tolist()), details["variance"], strict=True))


class _Corrected:
    """What both corrected schedulers share; stands in front of the diffusers class it corrects."""

    plain: Any
    leftover: dict[float, float]
    config: Any
    alphas_cumprod: Tensor
    num_inference_steps: int | None

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain scheduler: its config does not know the variances."""
        return cls.plain.from_config(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in vars(self).items() if key != "leftover"}
        return _corrected, (self.plain, state, self.leftover)

    def variance_at(self, timestep: Any) -> float:
        """The variance of the noise in the model's output."""
        found = self.leftover.get(float(timestep))
        if found is None:
            raise InputError(
                f"timestep {float(timestep):g} is not among the {len(self.leftover)} that the "
                "model was made for; set the scheduler as in calibration"
            )
        return found

    def signal(self, timestep: int) -> float:
        """The share of signal in the power of a sample at a timestep; below 0 is the result."""
        if timestep < 0:
            return float(getattr(self, "final_alpha_cumprod", 1.0))
        return float(self.alphas_cumprod[timestep])

    def predicted(self, alpha: float) -> tuple[float, float, float]:
        """p, q and s: the predicted sample is p x + q y, of x and the model's output y, and the
        predicted noise is s y and a multiple of x.  alpha: of `signal`."""
        a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
        if self.config.prediction_type == "epsilon":
            return 1 / max(a, _TINY), -b / max(a, _TINY), 1.0
        if self.config.prediction_type == "sample":
            return 0.0, 1.0, -a / max(b, _TINY)
        return a, -b, a

    def inside(self, sample: Tensor, output: Tensor, p: float, q: float) -> Tensor | float:
        """1 where the predicted sample is not clipped, 0 where it is."""
        if not self.config.clip_sample:
            return 1.0
        predicted = p * sample.float() + q * output.float()
        inside: Tensor = (predicted.abs() < self.config.clip_sample_range).float()
        return inside


class _CorrectedDDPM(_Corrected):
    brought: Tensor | float = 0.0  # variance that the output brings, during a step

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As in diffusers, with less noise."""
        base: Any = super()
        variance, alpha = self.variance_at(timestep), self.signal(int(timestep))
        previous = self.signal(int(base.previous_timestep(int(timestep))))
        p, q, _ = self.predicted(alpha)
        weight = math.sqrt(previous) * (1 - alpha / previous) / (1 - alpha)
        c = weight * q * self.inside(sample, model_output, p, q)
        self.brought = c * c * variance
        try:
            found = base.step(model_output, timestep, sample, generator)
        finally:
            del self.brought
        found.prev_sample = found.prev_sample.to(sample.dtype)  # variances by value are float32
        return found if return_dict else found.to_tuple()

    def _get_variance(self, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = super()
        variance: Tensor = base._get_variance(t, *args, **kwargs)
        if self.config.variance_type == "fixed_small_log":  # it holds the standard deviation
            return (variance.square() - self.brought).clamp(min=0).sqrt()
        return (variance - self.brought).clamp(min=0)


class _CorrectedDDIM(_Corrected):
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As in diffusers, with less noise.  With eta = 0 there is none, and it warns of that."""
        base: Any = super()
        if eta == 0:
            warnings.warn(
                "DDIMScheduler with eta=0 adds no noise: correct_scheduler() has nothing to "
                "subtract from; call it with eta > 0, or use the plain scheduler",
                stacklevel=2,
            )
        elif self.num_inference_steps and (generator is None or variance_noise is None):
            if variance_noise is None:
                variance_noise = _noise(model_output, generator)
                generator = None
            share = self._share(model_output, timestep, sample, eta, use_clipped_model_output)
            variance_noise = (variance_noise * share).to(variance_noise.dtype)
        return base.step(
            model_output,
            timestep,
            sample,
            eta,
            use_clipped_model_output,
            generator,
            variance_noise,
            return_dict,
        )

    def _share(
        self, output: Tensor, timestep: Any, sample: Tensor, eta: float, clipped: bool
    ) -> Tensor:
        """What is left of the noise's amplitude."""
        assert self.num_inference_steps is not None
        step = self.config.num_train_timesteps // self.num_inference_steps
        alpha, previous = self.signal(int(timestep)), self.signal(int(timestep) - step)
        variance = eta * eta * (1 - previous) / (1 - alpha) * (1 - alpha / previous)
        p, q, noise = self.predicted(alpha)
        inside = self.inside(sample, output, p, q)
        s: Tensor | float = noise
        if clipped:  # the noise is predicted again from the clipped sample
            s = -math.sqrt(alpha / (1 - alpha)) * q * inside
        c = math.sqrt(previous) * q * inside + math.sqrt(max(1 - previous - variance, 0.0)) * s
        found = c * c * self.variance_at(timestep)
        brought = found if isinstance(found, Tensor) else torch.tensor(found, dtype=torch.float32)
        return (1 - brought / variance).clamp(min=0).sqrt() if variance > 0 else brought * 0


def _noise(like: Tensor, generator: Any) -> Tensor:
    """The noise that diffusers' schedulers draw."""
    from diffusers.utils.torch_utils import randn_tensor

    drawn: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=like.dtype
    )
    return drawn


_MIXINS = {"DDPMScheduler": _CorrectedDDPM, "DDIMScheduler": _CorrectedDDIM}


@functools.cache
def _kind(base: type) -> Any:
    """The corrected class of a diffusers class, under the name of that class."""
    names = {"plain": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (_MIXINS[base.__name__], base), names)


def _corrected(base: type, state: dict[str, Any], leftover: dict[float, float]) -> Any:
    """A corrected scheduler in the state of a plain one."""
    kind = _kind(base)
    made = kind.__new__(kind)
    vars(made).update(state, leftover=leftover)
    return made
