"""The denoising loss: what the network is asked in training, and how an answer weighs."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import edm
from ..evaluation import grids, share_of_second
from ..images import pad_by_reflection, resize
from ..infdit.config import InfDiTConfig
from ..infdit.model import InfDiT
from ..metrics import Lpips
from ..semantics import Clip
from .config import LossConfig
from .data import Batch, looked_at


def unit_weight(sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


def epsilon_weight(sigma: Tensor) -> Tensor:
    """1 / sigma^2: an error of the predicted unit noise counts the same at every level."""
    return sigma**-2


def v_weight(sigma: Tensor) -> Tensor:
    """EDM's weight at sigma_data 1."""
    return (sigma**2 + 1) / sigma**2


CONDITION = 0.1  # what an error of the condition counts beside the logarithm of the picture's
# A mean squared error, for pictures in [-1, 1], that is near enough: a PSNR of 46 dB.
NEAR_ENOUGH = 1e-4


def _weight(config: LossConfig, network: InfDiTConfig, batch: Batch, sigma: Tensor) -> Tensor:
    """(B,). EDM's goes by sigma_data; a residual network's by the deviation that each crop's residual has.

    So a crop counts by what share of its error could go. By one sigma_data for all, foliage and water, which no network
    can place, drown clean edges, whose residuals are ten times smaller.
    """
    if config.weight != "edm":
        return {"unit": unit_weight, "v": v_weight, "epsilon": epsilon_weight}[config.weight](sigma)
    if network.parametrisation == "picture":
        return edm.loss_weight(sigma, network.sigma_data)
    residual = (batch.original - batch.upsampled).square().flatten(1).mean(1)
    return edm.loss_weight(sigma, (residual + NEAR_ENOUGH).sqrt())


def denoising_loss(denoised: Tensor, original: Tensor, weight: Tensor, power: int = 2) -> Tensor:
    """weight * mean |denoised - original|^power per picture: (B, C, H, W) twice, (B,) -> (B,)."""
    return weight * (denoised - original).abs().pow(power).flatten(1).mean(1)


def overshoot(denoised: Tensor, original: Tensor, radius: int) -> Tensor:
    """How far (B, C, H, W) lies outside of what the original holds within so many pixels: ringing, halos."""

    def highest(x: Tensor) -> Tensor:
        side = 2 * radius + 1
        return F.max_pool2d(F.max_pool2d(x, (side, 1), 1, (radius, 0)), (1, side), 1, (0, radius))

    return F.relu(denoised - highest(original)) + F.relu(-highest(-original) - denoised)


def prediction_loss(predict: Callable[..., Tensor], scale: int, batch: Batch) -> Tensor:
    """Logarithm (B,) of the root mean squared error of the predictor's picture: its PSNR, up to sign and scale
    (arXiv 2204.04676), so that a crop counts by what share of its error could go. predict: InfDiT.predict."""
    return _log_error(predict(batch.low_res, batch.margin(scale)), batch.original)


def detail_loss(
    predict: Callable[..., Tensor],
    scale: int,
    config: LossConfig,
    batch: Batch,
    lpips: Sequence[Lpips],
    shift: tuple[int, int] = (0, 0),
) -> Tensor:
    """The same (B,) of the detailer's picture, and how unlike it looks and overshoot, each times what `config` says."""
    picture = predict(batch.low_res, batch.margin(scale), detail=1.0)
    losses = _log_error(picture, batch.original)
    if config.overshoot:
        outside = overshoot(picture, batch.original, 2 * scale).pow(config.power).flatten(1).mean(1)
        losses = losses + config.overshoot * outside
    return losses + config.perceptual * _unlike(picture, batch.original, scale, config, lpips, shift)


def _unlike(
    picture: Tensor,
    original: Tensor,
    scale: int,
    config: LossConfig,
    lpips: Sequence[Lpips],
    shift: tuple[int, int],
) -> Tensor:
    """How unlike (B,) two pictures look: LPIPS, and what repeats in every low-resolution pixel, which it hardly sees.

    Both move by `shift` pixels before LPIPS, which doesn't see every pixel alike.
    """
    top, left = shift
    pair = [t[:, :, top:, left:] / 2 + 0.5 for t in (picture, original)]
    return sum((judge(*pair) for judge in lpips), config.screen * _repeated(picture - original, scale))


def _repeated(x: Tensor, scale: int) -> Tensor:
    """Mean square (B,) of what repeats in every scale x scale pixels of a quarter of (B, C, H, W), beside its mean."""
    whole = [side // scale * scale for side in x.shape[2:]]
    x = x[:, :, : whole[0], : whole[1]]
    alike = F.adaptive_avg_pool2d(F.pixel_unshuffle(x, scale), 2).unflatten(1, (x.shape[1], scale**2))
    return (alike - alike.mean(2, keepdim=True)).square().flatten(1).mean(1)


def _log_error(picture: Tensor, original: Tensor) -> Tensor:
    error = denoising_loss(picture, original, torch.ones(len(picture), device=picture.device))
    return (error + NEAR_ENOUGH).log() / 2


def condition_loss(network: InfDiT, batch: Batch, detailed: bool = False) -> Tensor:
    """How far (B,) the first number of the predictor's condition is from what the low resolution lost, weighed.

    That is log(1 + d), d its deviation from a clean one in levels of 255: a noise estimator as in CBDNet (arXiv
    1807.04686). By PSNR alone a condition learns nothing: its factors begin at 1, whatever it says. detailed: of the
    detailer's condition instead.
    """
    scale, device = network.config.scale, batch.original.device
    condition = None
    if predictor := network.detailer if detailed else network.predictor:
        condition = predictor.condition_of(batch.low_res, device, network.compute()[1])
    if condition is None:
        return torch.zeros(len(batch.original), device=device)
    margin = batch.margin(scale)
    within = slice(margin, -margin or None)
    given = batch.low_res[:, :, within, within]
    clean = resize(batch.original, (given.shape[2], given.shape[3])).clamp(-1, 1)
    off = (given - clean)[:, :, 2:-2, 2:-2]  # further out the given one may have looked beyond the original
    lost = (1 + 127.5 * off.square().flatten(1).mean(1).sqrt()).log()
    return CONDITION * (condition[:, 0] - lost).abs()


def detail_shares(network: InfDiTConfig, config: LossConfig) -> list[float]:
    """The detailer's shares in the first pictures to learn on: those of the presets; without LPIPS none, for squared
    errors alone would teach the network to smooth what the detailer adds."""
    return sorted({preset.detail for preset in network.presets.values()}) if config.perceptual else [0.0]


@torch.no_grad()
def with_prediction(batch: Batch, network: InfDiT, detail: float = 0.0) -> Batch:
    """The batch with the network's own first picture, where it has a predictor, in place of the bicubic one.

    detail: the detailer's share of it.
    """
    if network.predictor is None:
        return batch
    margin = batch.margin(network.config.scale)
    return batch._replace(upsampled=network.upsample(batch.low_res, margin, detail=detail))


def blended(denoise: Callable[..., Tensor], network: InfDiTConfig) -> Callable[..., Tensor]:
    """`denoise`, blended from both grids of a network that has two: what is seen in the end.

    The second grid begins half a block and half a patch before the crop and has as many blocks, so it ends that much
    earlier: the crop's last pixels are left out, and (B, C, H, W) comes back so much smaller.
    """
    off = grids(network)[-1]
    if not off:
        return denoise

    def with_moved(x: Tensor, by: int) -> Tensor:
        return torch.cat([x, pad_by_reflection(x, x.shape[2], x.shape[3], by)])

    def twice(
        noisy: Tensor, sigma: Tensor, low_res: Tensor, *, upsampled: Tensor, semantic: Tensor | None, **options: Any
    ) -> Tensor:
        noisy, upsampled = with_moved(noisy, off), with_moved(upsampled, off)
        low_res = with_moved(low_res, off // network.scale)  # rounded as `evaluation.denoise` does
        semantic = None if semantic is None else semantic.repeat(2, 1)
        both = denoise(noisy, sigma.repeat(2), low_res, upsampled=upsampled, semantic=semantic, **options)
        first, second = both.chunk(2)
        first, second = first[:, :, :-off, :-off], second[:, :, off:, off:]
        return first.lerp(second, share_of_second((first.shape[2], first.shape[3]), network).to(first))

    return twice


def loss_at(
    denoise: Callable[..., Tensor],
    network: InfDiTConfig,
    config: LossConfig,
    batch: Batch,
    sigma: Tensor,
    noisy: Tensor,
    own: Tensor | None = None,
    lpips: Sequence[Lpips] = (),
    shift: tuple[int, int] = (0, 0),
    detail: float = 0.0,
    **options: Any,
) -> Tensor:
    """Loss (B,) of one evaluation at given noise levels (B,), of what both grids of blocks reach.

    own: (B,) true where the noise is on the upsampled picture. lpips: for config.perceptual; both pictures move by
    `shift` pixels before it. detail: the detailer's share of the upsampled picture. options: more for `denoise`.
    """
    given = {"upsampled": batch.upsampled, "semantic": batch.semantic, "direction": config.direction}
    denoised = blended(denoise, network)(noisy, sigma, batch.low_res, **given, **options)
    seen = (..., slice(denoised.shape[2]), slice(denoised.shape[3]))
    batch = batch._replace(original=batch.original[seen], upsampled=batch.upsampled[seen])
    original = batch.original
    # A sampler's own noisy picture says no more about the original than pure noise does.
    weight = _weight(config, network, batch, sigma if own is None else torch.where(own, network.sigma_max, sigma))
    losses = denoising_loss(denoised, original, weight, config.power)
    if config.overshoot:
        outside = overshoot(denoised, original, 2 * network.scale).pow(config.power).flatten(1).mean(1)
        losses = losses + config.overshoot * weight * outside
    # In proportion to sigma: where a schedule ends then says how far it goes from the mean to what looks right. Without
    # noise the first picture says it.
    little = sigma < min(config.perceptual_below, network.sigma_max)
    strength = torch.where(little, sigma / config.perceptual_below, torch.where(sigma < network.sigma_max, 0, detail))
    judged = strength > 0
    if lpips and config.perceptual and judged.any():
        unlike = _unlike(denoised[judged], original[judged], network.scale, config, lpips, shift)
        losses = losses.index_add(0, judged.nonzero()[:, 0], config.perceptual * strength[judged] * unlike)
    return losses


def training_loss(
    denoise: Callable[..., Tensor],
    network: InfDiTConfig,
    config: LossConfig,
    batch: Batch,
    generator: torch.Generator,
    clip: Clip | None = None,
    lpips: Sequence[Lpips] = (),
    detail: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss (B,) at random noise levels, and these (B,), sigma_max where a sample was without noise.

    denoise: InfDiT.denoise. lpips: for config.perceptual. detail: the detailer's share of the upsampled pictures.
    Everything random comes from `generator`, on the pictures' device.
    """
    original, device = batch.original, batch.original.device
    count, crop = len(original), original.shape[3]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    sigma = (config.sigma_log_mean + config.sigma_log_deviation * normal(count)).exp()
    sigma = sigma.clamp(network.sigma_min, network.sigma_max)
    noise = normal(*original.shape)
    kept, regressed = torch.rand(2, count, generator=generator, device=device)
    if config.lr_dropout:  # what the network does where the low resolution says nothing
        dropped = (kept < config.lr_dropout)[:, None, None, None]
        low_res, upsampled = (
            torch.where(dropped, normal(*t.shape).clamp(-1, 1), t) for t in (batch.low_res, batch.upsampled)
        )
        batch = batch._replace(low_res=low_res, upsampled=upsampled)
    batch = looked_at(batch, network.scale, clip)  # CLIP is no way around the dropout
    mean_asked = regressed < config.regression
    sigma = torch.where(mean_asked, network.sigma_max, sigma)
    little = (sigma < config.perceptual_below) & ~mean_asked
    own = little & (regressed < config.regression + config.own_input)
    start = torch.where((mean_asked | own)[:, None, None, None], batch.upsampled, original)
    noisy = start + torch.where(mean_asked, 0, sigma)[:, None, None, None] * noise
    # One pair of offsets a batch, any that keep its positions clear of the table's wrap: up to 7 crops at 1024.
    largest = network.rope_side - crop // network.patch_size
    row, column = torch.randint(0, largest + 1, (2,), generator=generator, device=device).tolist()
    # AlexNet looks every 4 px only, and what it doesn't see would always be the same.
    top, left = torch.randint(0, 4, (2,), generator=generator, device=device).tolist()
    shift, offset = (top, left), (row, column)
    losses = loss_at(denoise, network, config, batch, sigma, noisy, own, lpips, shift, detail, offset=offset)
    return losses, sigma


class LossMeter:
    """Mean loss by noise level: quarters of the levels drawn, and samples without noise."""

    def __init__(self, config: LossConfig, sigma_max: float, device: torch.device) -> None:
        quartiles = (-0.6745, 0.0, 0.6745)
        self.edges = [math.exp(config.sigma_log_mean + config.sigma_log_deviation * z) for z in quartiles]
        self.sigma_max = sigma_max
        self.sums = torch.zeros(2, len(self.edges) + 2, device=device)  # of losses, of samples

    def add(self, loss: Tensor, sigma: Tensor) -> None:
        """Loss and sigma, (B,)."""
        level = torch.bucketize(sigma, torch.tensor(self.edges, device=sigma.device))
        level = torch.where(sigma >= self.sigma_max, len(self.edges) + 1, level)
        self.sums.index_add_(1, level, torch.stack([loss.detach(), torch.ones_like(loss)]))

    def means(self, sums: Tensor) -> dict[str, float]:
        """Names and means of sums as kept here, perhaps added up over processes; NaN where nothing fell."""
        edges = [f"{edge:.2g}" for edge in self.edges]
        names = [f"loss_below_{edges[0]}", *(f"loss_{a}_{b}" for a, b in pairwise(edges)), f"loss_above_{edges[-1]}"]
        values = (sums[0] / sums[1]).tolist()
        return {"loss": float(sums[0].sum() / sums[1].sum()), **dict(zip([*names, "loss_mean"], values, strict=True))}
