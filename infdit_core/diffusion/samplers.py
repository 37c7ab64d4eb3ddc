"""Samplers: plain functions over denoise(x, sigma), k-diffusion's signature.

Every sampler takes
  denoise   (x, sigma) -> estimate of the clean picture; sigma a 0-d tensor
  x         (B, C, H, W), the picture with noise of deviation sigmas[0]
  sigmas    (n + 1,), falling, usually to 0
  noise     x -> standard normal noise like x; None draws from torch's global generator
  callback  called before every step with {"x", "i", "sigma", "denoised"}
and returns the picture at sigmas[-1]. State is fp32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]
StepCallback = Callable[[dict[str, Any]], None]


def _report(callback: StepCallback | None, x: Tensor, i: int, sigma: Tensor, denoised: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "denoised": denoised})


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """EDM's stochastic sampler, second order: 2n - 1 evaluations (arXiv 2206.00364, algorithm 2)."""
    return _edm(denoise, x, sigmas, True, s_churn, s_tmin, s_tmax, s_noise, noise, callback)


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """EDM's sampler without its second-order correction: n evaluations."""
    return _edm(denoise, x, sigmas, False, s_churn, s_tmin, s_tmax, s_noise, noise, callback)


def _edm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    second_order: bool,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
    noise: Noise | None,
    callback: StepCallback | None,
) -> Tensor:
    x, sigmas = x.float(), sigmas.to(x.device, torch.float32)
    steps = len(sigmas) - 1
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        if gamma > 0:
            raised = sigma * (1 + gamma)
            x = x + (noise or torch.randn_like)(x) * s_noise * (raised**2 - sigma**2).sqrt()
            sigma = raised
        denoised = denoise(x, sigma)
        _report(callback, x, i, sigma, denoised)
        # In place where it can be: these tensors have the size of the result.
        slope = (x - denoised).div_(sigma)
        del denoised
        euler_step = x + (following - sigma) * slope
        if second_order and following > 0:
            slope_there = (euler_step - denoise(euler_step, following)).div_(following)
            x = x + slope.add_(slope_there).mul_((following - sigma) / 2)
        else:
            x = euler_step
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_noise: float = 0.1,
    noise: Noise | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Inf-DiT's DDIM variant: a share s_noise of every step's noise is fresh. n evaluations."""
    x, sigmas = x.float(), sigmas.to(x.device, torch.float32)
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i], sigmas[i + 1]
        denoised = denoise(x, sigma)
        _report(callback, x, i, sigma, denoised)
        slope = (x - denoised) / sigma
        # Drawn for the step to 0 as well, unused there: noise stays in step with the reference.
        fresh = (noise or torch.randn_like)(x)
        x = denoised + math.sqrt(1 - s_noise**2) * following * slope + s_noise * following * fresh
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), multistep second order (arXiv 2211.01095, algorithm 2) at alpha = 1: n evaluations.

    Deterministic; `noise` is never drawn.
    """
    x, sigmas = x.float(), sigmas.to(x.device, torch.float32)
    before: Tensor | None = None
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i], sigmas[i + 1]
        denoised = denoise(x, sigma)
        _report(callback, x, i, sigma, denoised)
        estimate = denoised
        if before is not None and following > 0:
            # In lambda = -ln sigma: the ratio of the last step's length to this one's.
            ratio = (sigmas[i - 1] / sigma).log() / (sigma / following).log()
            estimate = denoised + (denoised - before) / (2 * ratio)
        x = following / sigma * x + (1 - following / sigma) * estimate
        before = denoised
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"heun": heun, "euler": euler, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
