"""The second-order degradation of Real-ESRGAN (arXiv 2107.10833), with the parameters that Inf-DiT was trained on.

A picture is blurred, resized, made noisy and stored as JPEG, and all of it once more, on the way down to its low
resolution. Milder is what happens to a picture that was reduced with care: noise and JPEG, once. Every sample of a
batch draws its own kernels, noise and JPEG quality.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 10  # of the largest kernel; smaller ones are padded with zeros, so that a batch is one convolution


@dataclass(frozen=True)
class Stage:
    """What one round of blur, resize and noise draws from; ranges are (low, high)."""

    blur: float  # probability
    sigma: tuple[float, float]  # of the kernels, pixels
    enlarge: tuple[float, float]  # probability, largest factor
    reduce: tuple[float, float]  # probability, smallest factor
    gaussian: tuple[float, float]  # deviation of Gaussian noise in levels of 255
    poisson: tuple[float, float]  # scale of Poisson noise

    def softened(self, share: float) -> "Stage":
        """The widest blur and the smallest size that far, 0 to 1, on the way from none to these."""
        (narrow, wide), (reduced, smallest) = self.sigma, self.reduce
        return replace(
            self, sigma=(narrow, narrow + share * (wide - narrow)), reduce=(reduced, 1 - share * (1 - smallest))
        )


FIRST = Stage(1.0, (0.2, 3.0), enlarge=(0.2, 1.5), reduce=(0.7, 0.3), gaussian=(1.0, 15.0), poisson=(0.05, 2.0))
SECOND = Stage(0.5, (0.2, 1.5), enlarge=(0.3, 1.2), reduce=(0.4, 0.6), gaussian=(1.0, 12.0), poisson=(0.05, 1.0))
FIRST_QUALITY, LAST_QUALITY = (60.0, 95.0), (60.0, 100.0)  # of JPEG
GAUSSIAN_NOISE, GREY_NOISE = 0.5, 0.4  # probabilities
SINC, LAST_SINC = 0.1, 0.8  # probabilities: in place of a kernel of FAMILIES, and at the end
FILTERS = ("area", "bilinear", "bicubic")
MILD_DEVIATION, MILD_QUALITY = (0.0, 10.0), (40.0, 95.0)  # of Gaussian noise in levels of 255, of JPEG


@dataclass(frozen=True)
class Family:
    """A family of blur kernels and how often it is drawn."""

    probability: float
    isotropic: bool
    beta: tuple[float, float]  # half of the draws from [low, 1], half from [1, high]
    plateau: bool = False


FAMILIES = (
    Family(0.45, True, (1.0, 1.0)),
    Family(0.25, False, (1.0, 1.0)),
    Family(0.12, True, (0.5, 4.0)),
    Family(0.03, False, (0.5, 4.0)),
    Family(0.12, True, (1.0, 2.0), plateau=True),
    Family(0.03, False, (1.0, 2.0), plateau=True),
)


@torch.no_grad()
def degrade(x: Tensor, scale: int, generator: torch.Generator, softness: float = 1.0) -> Tensor:
    """(B, 3, H, W) fp32 RGB in 0..1 -> (B, 3, H / scale, W / scale) in 0..1, rounded to 8 bit.

    H and W are multiples of scale, at least `smallest_side(scale)`. `generator` is on the device of x; equal ones give
    equal pictures. Choices that change shapes (the resizes and the order of the last steps) are drawn once for the
    batch, as published practice does; all others for every sample. softness: how far blur, loss of size and the last
    sinc filter go, 1 as published, 0 hardly at all: a network that undoes the published ones also sharpens what a lens
    left out of focus. Noise and JPEG are the same.
    Raises ValueError for other shapes.
    """
    _check(x, scale)
    height, width = x.shape[2] // scale, x.shape[3] // scale
    dice = _dice(x, generator)

    x = _stage(x, FIRST.softened(softness), (x.shape[2], x.shape[3]), generator, dice)
    x = jpeg(x, _uniform(*FIRST_QUALITY, len(x), dice))
    x = _stage(x, SECOND.softened(softness), (height, width), generator, dice)

    quality = _uniform(*LAST_QUALITY, len(x), dice)
    cutoff = _uniform(math.pi / 3, math.pi, len(x), dice)
    kernels = _some(LAST_SINC * softness, normalised(sinc(cutoff), _kernel_sizes(len(x), dice)), dice)
    if _chance(0.5, 1, dice).item():
        x = jpeg(blur(_resize(x, (height, width), dice), kernels), quality)
    else:
        x = blur(_resize(jpeg(x, quality), (height, width), dice), kernels)
    return (x.clamp(0, 1) * 255).round() / 255


@torch.no_grad()
def degrade_mildly(low_res: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise and JPEG, once: (B, 3, H, W) fp32 RGB in 0..1 -> the same shape, rounded to 8 bit.

    A first-order degradation, without blur or aliasing. `generator` as in `degrade`.
    """
    count, dice = len(low_res), _dice(low_res, generator)
    deviation, grey = _uniform(*MILD_DEVIATION, count, dice) / 255, _chance(GREY_NOISE, count, dice)
    noisy = add_noise(low_res, torch.ones_like(grey), deviation, grey, generator)
    return (jpeg(noisy, _uniform(*MILD_QUALITY, count, dice)) * 255).round() / 255


def smallest_side(scale: int) -> int:
    """Pixels that a side needs at least: where it is smallest, the widest kernel reflects a radius of it."""
    return math.ceil((RADIUS + 1) * max(scale, 1 / FIRST.reduce[1]))


def _check(x: Tensor, scale: int) -> None:
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"degrade takes (B, 3, H, W), not {tuple(x.shape)}")
    if x.shape[2] % scale or x.shape[3] % scale:
        raise ValueError(f"sides must be multiples of the scale {scale}, not {x.shape[3]} x {x.shape[2]}")
    least = smallest_side(scale)
    if min(x.shape[2:]) < least:
        raise ValueError(f"sides must be of at least {least} pixels at scale {scale}, not {x.shape[3]} x {x.shape[2]}")


def _stage(x: Tensor, stage: Stage, full: tuple[int, int], generator: torch.Generator, dice: torch.Generator) -> Tensor:
    """Blur, resize by a random factor relative to the size `full`, add noise."""
    count = len(x)
    x = blur(x, _some(stage.blur, random_kernels(count, stage.sigma, dice), dice))
    factor = _random_factor(stage, dice)
    x = _resize(x, (round(full[0] * factor), round(full[1] * factor)), dice)
    gaussian = _chance(GAUSSIAN_NOISE, count, dice)
    deviation, scale = _uniform(*stage.gaussian, count, dice) / 255, _uniform(*stage.poisson, count, dice)
    grey = _chance(GREY_NOISE, count, dice)
    return add_noise(x, gaussian, torch.where(gaussian, deviation, scale), grey, generator)


# --- draws


def _dice(x: Tensor, generator: torch.Generator) -> torch.Generator:
    """For parameters: they are drawn on the CPU, so that a GPU is waited for once, here."""
    seed = torch.randint(2**62, (), generator=generator, device=x.device).item()
    return torch.Generator().manual_seed(int(seed))


def _uniform(low: float | Tensor, high: float | Tensor, count: int, dice: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=dice)


def _chance(probability: float, count: int, dice: torch.Generator) -> Tensor:
    return torch.rand(count, generator=dice) < probability


def _random_factor(stage: Stage, dice: torch.Generator) -> float:
    (enlarged, largest), (reduced, smallest) = stage.enlarge, stage.reduce
    choice, place = torch.rand(2, generator=dice).tolist()
    if choice < enlarged:
        return 1 + (largest - 1) * place
    return smallest + (1 - smallest) * place if choice < enlarged + reduced else 1.0


# --- blur


def blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Filter every sample of (B, C, H, W) with its own of (B, n, n) kernels, n odd; borders are reflected."""
    radius = kernels.shape[-1] // 2
    padded = F.pad(x, [radius] * 4, "reflect").transpose(0, 1)  # (C, B, H, W): the kernels are the groups
    weight = kernels.to(x, non_blocking=True)[:, None]
    return F.conv2d(padded, weight, groups=len(kernels)).transpose(0, 1)


def random_kernels(count: int, sigma: tuple[float, float], dice: torch.Generator) -> Tensor:
    """(count, 21, 21) kernels of the families and the sinc, with deviations in the range `sigma` of pixels."""
    sizes = _kernel_sizes(count, dice)
    weights = torch.tensor([family.probability for family in FAMILIES])
    families = [FAMILIES[i] for i in torch.multinomial(weights, count, replacement=True, generator=dice).tolist()]
    isotropic = torch.tensor([family.isotropic for family in families])
    flat = torch.tensor([family.plateau for family in families])[:, None, None]
    low, high = torch.tensor([family.beta for family in families]).T

    sigma_x, sigma_y = _uniform(*sigma, count, dice), _uniform(*sigma, count, dice)
    rotation = _uniform(-math.pi, math.pi, count, dice)
    distance = squared_distance(sigma_x, torch.where(isotropic, sigma_x, sigma_y), rotation)
    beta = torch.where(_chance(0.5, count, dice), _uniform(low, 1.0, count, dice), _uniform(1.0, high, count, dice))
    kernels = torch.where(flat, plateau(distance, beta), gaussian(distance, beta))

    cutoff = _uniform(torch.where(sizes < 13, math.pi / 3, math.pi / 5), math.pi, count, dice)
    kernels = torch.where(_chance(SINC, count, dice)[:, None, None], sinc(cutoff), kernels)
    return normalised(kernels, sizes)


def squared_distance(sigma_x: Tensor, sigma_y: Tensor, rotation: Tensor) -> Tensor:
    """x' C^-1 x of the pixels around a centre, (B, 21, 21), C = U diag(sigma_x^2, sigma_y^2) U'; arguments (B,)."""
    x, y = _offsets()
    cos, sin = (t[:, None, None] for t in (rotation.cos(), rotation.sin()))
    along, across = cos * x + sin * y, cos * y - sin * x
    return (along / sigma_x[:, None, None]) ** 2 + (across / sigma_y[:, None, None]) ** 2


def gaussian(distance: Tensor, beta: Tensor) -> Tensor:
    """Generalised Gaussian exp(-d^beta / 2) of squared distances (B, 21, 21), beta (B,); beta = 1 is the Gaussian."""
    return torch.exp(-0.5 * distance ** beta[:, None, None])


def plateau(distance: Tensor, beta: Tensor) -> Tensor:
    """1 / (d^beta + 1) of squared distances (B, 21, 21), beta (B,): flat at the centre, with long tails."""
    return 1 / (distance ** beta[:, None, None] + 1)


def sinc(cutoff: Tensor) -> Tensor:
    """w J1(w r) / (2 pi r), (B, 21, 21): the ideal low-pass of cutoffs w (B,) in radians a pixel; it rings."""
    x, y = _offsets()
    r = torch.sqrt(x**2 + y**2)
    w = cutoff[:, None, None]
    rings = w * torch.special.bessel_j1(w * r) / (2 * math.pi * r)
    return torch.where(r > 0, rings, w**2 / (4 * math.pi))  # the limit at the centre


def normalised(kernels: Tensor, sizes: Tensor) -> Tensor:
    """Cut (B, 21, 21) kernels to odd sizes (B,), zeros outside, and make each sum to 1."""
    x, y = _offsets()
    inside = torch.maximum(x.abs(), y.abs()) <= (sizes // 2)[:, None, None]
    kernels = kernels * inside
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    return torch.where(kernels.abs() < 1e-12, 0, kernels)  # denormal numbers make a CPU ten times slower


def _kernel_sizes(count: int, dice: torch.Generator) -> Tensor:
    return 7 + 2 * torch.randint(RADIUS - 2, (count,), generator=dice)  # odd, 7..21


def _some(probability: float, kernels: Tensor, dice: torch.Generator) -> Tensor:
    """Keep each of the kernels with a probability; put one that changes nothing in the place of the others."""
    nothing = torch.zeros_like(kernels[0])
    nothing[RADIUS, RADIUS] = 1
    return torch.where(_chance(probability, len(kernels), dice)[:, None, None], kernels, nothing)


def _offsets() -> tuple[Tensor, Tensor]:
    """x and y of a kernel's pixels from its centre, (1, 21) and (21, 1)."""
    place = torch.arange(-RADIUS, RADIUS + 1.0)
    return place[None], place[:, None]


# --- resize


def _resize(x: Tensor, size: tuple[int, int], dice: torch.Generator) -> Tensor:
    """Resize with a random filter; without antialiasing, for the pictures that it spoils are out there."""
    mode = FILTERS[int(torch.randint(len(FILTERS), (), generator=dice))]
    return F.interpolate(x, size, mode=mode, align_corners=None if mode == "area" else False)


# --- noise


def add_noise(x: Tensor, gaussian: Tensor, strength: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise to (B, 3, H, W) and clip it to 0..1; per sample, (B,) each:

    gaussian: Gaussian noise with the deviation `strength`, else Poisson noise times `strength`. Poisson noise is that
    of a count of x v photons, v the number of distinct 8-bit levels in the sample, rounded up to a power of two.
    grey: the same noise in all channels (for Poisson noise that of the luma).
    """
    gaussian, strength, grey = (
        t.to(x.device, non_blocking=True)[:, None, None, None] for t in (gaussian, strength, grey)
    )
    levels = (torch.where(grey, _luma(x), x).clamp(0, 1) * 255).round()
    seen = torch.zeros(len(x), 256, device=x.device).scatter_(1, levels.flatten(1).long(), 1.0)
    powers = 2.0 ** torch.arange(8, device=x.device)
    v = 2.0 ** (seen.sum(1, keepdim=True) > powers).sum(1)[:, None, None, None]  # 2^ceil(log2(distinct levels))
    mean = levels / 255
    # Poisson draws are the slow part; of a rate of 0 they cost next to nothing.
    poisson = torch.poisson(torch.where(gaussian, 0, mean * v), generator) / v - mean
    normal = torch.randn(x.shape, generator=generator, device=x.device)
    noise = torch.where(gaussian, normal, poisson)
    return (x + strength * torch.where(grey, noise[:, :1], noise)).clamp(0, 1)


def _luma(x: Tensor) -> Tensor:
    """Y of BT.601, full range, as in JPEG: (B, 3, H, W) -> (B, 1, H, W)."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


# --- JPEG

# Quantisation steps at quality 50: ITU T.81, tables K.1 (luma) and K.2 (chroma).
_LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """(B, 3, H, W) RGB as it comes back from baseline JPEG 4:2:0, in 0..1; quality (B,) in 1..100, libjpeg's scale.

    x is clamped to 0..1. Y, Cb, Cr and the DCT's coefficients are rounded as in a file; the decoded picture isn't. What
    Pillow decodes is as near as 44 to 51 dB, more so at high quality.
    """
    height, width = x.shape[2:]
    steps = quantisation_steps(quality).to(x, non_blocking=True)
    x = F.pad(x.clamp(0, 1) * 255, (0, -width % 16, 0, -height % 16), "replicate")
    y = _luma(x)
    cb, cr = (x[:, 2:] - y) / 1.772, (x[:, :1] - y) / 1.402
    chroma = F.avg_pool2d(torch.cat([cb, cr], 1).round(), 2)
    y = _quantise(y.round() - 128, steps[:, 0]) + 128
    # Bilinear is libjpeg's "fancy upsampling".
    chroma = F.interpolate(_quantise(chroma, steps[:, 1]), scale_factor=2, mode="bilinear", align_corners=False)
    blue, red = y + 1.772 * chroma[:, :1], y + 1.402 * chroma[:, 1:]
    green = (y - 0.299 * red - 0.114 * blue) / 0.587
    return (torch.cat([red, green, blue], 1)[:, :, :height, :width] / 255).clamp(0, 1)


def quantisation_steps(quality: Tensor) -> Tensor:
    """libjpeg's steps of luma and chroma for qualities (B,) in 1..100: (B, 2, 8, 8), whole numbers in 1..255."""
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    steps = torch.tensor((_LUMA_STEPS, _CHROMA_STEPS), device=quality.device)
    return ((steps * percent[:, None, None, None] + 50) / 100).floor().clamp(1, 255)


def _quantise(x: Tensor, steps: Tensor) -> Tensor:
    """Round the DCT coefficients of (B, C, H, W) to multiples of (B, 8, 8) steps."""
    frequency, place = torch.arange(8.0, device=x.device)[:, None], torch.arange(8.0, device=x.device)
    dct = torch.cos((2 * place + 1) * frequency * math.pi / 16) / 2  # ITU T.81, A.3.3
    dct = torch.where(frequency == 0, math.sqrt(1 / 8), dct)
    steps = steps[:, None].tile(x.shape[2] // 8, x.shape[3] // 8)
    return _transform((_transform(x, dct) / steps).round() * steps, dct.T)


def _transform(x: Tensor, matrix: Tensor) -> Tensor:
    """matrix @ block @ matrix' for each 8 x 8 block of (B, C, H, W)."""
    columns = matrix @ x.unflatten(2, (-1, 8))  # (B, C, H / 8, 8, W)
    rows = columns.unflatten(4, (-1, 8)) @ matrix.T  # (B, C, H / 8, 8, W / 8, 8)
    return rows.flatten(4).flatten(2, 3)
