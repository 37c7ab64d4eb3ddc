"""How a network F becomes a denoiser: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM eq. 7).

Each function gives (c_skip, c_out, c_in, c_noise) of sigma's shape for data of deviation sigma_data; sigma is clamped
below at SIGMA_FLOOR.
"""

from collections.abc import Callable

from torch import Tensor

SIGMA_FLOOR = 0.001  # the network never sees less noise than this

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


def edm(sigma: Tensor, sigma_data: float) -> Coefficients:
    """F predicts a mixture of picture and noise of unit variance (Karras et al. 2022, arXiv 2206.00364, table 1)."""
    sigma = sigma.clamp(min=SIGMA_FLOOR)
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), 0.25 * sigma.log()


def v(sigma: Tensor, sigma_data: float) -> Coefficients:
    """F predicts the velocity v (Salimans and Ho 2022, arXiv 2202.00512), told EDM's c_noise: EDM's with F negated."""
    c_skip, c_out, c_in, c_noise = edm(sigma, sigma_data)
    return c_skip, -c_out, c_in, c_noise


def epsilon(sigma: Tensor, sigma_data: float) -> Coefficients:
    """F predicts the unit noise (DDPM, arXiv 2006.11239) and is told sigma itself."""
    sigma = sigma.clamp(min=SIGMA_FLOOR)
    return sigma.new_ones(sigma.shape), -sigma, (sigma**2 + sigma_data**2).rsqrt(), sigma


PRECONDITIONINGS: dict[str, Callable[[Tensor, float], Coefficients]] = {"edm": edm, "v": v, "epsilon": epsilon}
