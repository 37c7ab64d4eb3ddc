"""Which optimiser learns what, and how fast."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import Optimizer

from .config import OptimizerConfig


class _FlatKernel(nn.Module):
    """A parametrisation: a convolution's kernel as a matrix (out, in * 3 * 3), for torch's Muon takes nothing else."""

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (-1, 3, 3)).contiguous(memory_format=torch.channels_last)  # as what it meets

    def right_inverse(self, kernel: Tensor) -> Tensor:
        return kernel.flatten(1)


def flatten_kernels(module: nn.Module) -> None:
    """Keep the kernels of a module's convolutions as matrices from here on."""
    for convolution in [m for m in module.modules() if isinstance(m, nn.Conv2d)]:
        register_parametrization(convolution, "weight", _FlatKernel())


class Centring:
    """Convolutions of 3 x 3 learn from what comes in as if it had no mean (Schraudolph, Centering Neural Network
    Gradient Factors, 1998).

    In a residual network what comes in has a mean far above its deviation, and a step of a kernel along it shifts all
    that comes out. A channel that is shifted below the next ReLU everywhere learns no more, so channels fall silent one
    by one. Here the bias makes up for what a kernel's step shifts, and the gradient is that of both together.
    """

    def __init__(self, module: nn.Module) -> None:
        self.convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        self.seen: dict[nn.Module, list[Tensor]] = {}  # of each input (B, C, H, W) since the last step: (C,)
        for convolution in self.convolutions:
            convolution.register_forward_pre_hook(self._see)

    def _see(self, convolution: nn.Module, inputs: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():
            self.seen.setdefault(convolution, []).append(inputs[0].detach().mean((0, 2, 3), dtype=torch.float32))

    @contextlib.contextmanager
    def step(self, averaged: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Around the optimisers' step. averaged: gives the mean of a tensor over the processes."""
        means = averaged(torch.stack([torch.stack(self.seen.pop(c)).mean(0) for c in self.convolutions]))
        steps = []
        for convolution, mean in zip(self.convolutions, means, strict=True):
            kernel, bias = sorted(convolution.parameters(), key=torch.Tensor.dim, reverse=True)
            assert kernel.grad is not None and bias.grad is not None
            spread = mean[:, None].expand(-1, 9).reshape(kernel.shape[1:])
            kernel.grad -= bias.grad.view(-1, *[1] * spread.ndim) * spread
            steps.append((kernel, bias, spread, kernel.detach().clone()))
        yield
        with torch.no_grad():
            for kernel, bias, spread, before in steps:
                bias.sub_(((kernel - before) * spread).flatten(1).sum(1))


def optimizers(trained: dict[str, nn.Parameter], config: OptimizerConfig) -> list[Optimizer]:
    """Those of `config` for parameters by name. Raises ValueError where torch has no Muon."""
    rate, decay = config.learning_rate, config.weight_decay
    matrices: list[nn.Parameter] = []
    if config.kind == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError("optimizer.kind=muon needs torch 2.9 or later; say optimizer.kind=adamw")
        # What only embeds or modulates is AdamW's (Jordan et al. 2024).
        inner = [
            (n, p) for n, p in trained.items() if n.startswith(("layers.", "predictor.blocks.", "detailer.blocks."))
        ]
        matrices = [p for n, p in inner if p.ndim == 2 and ".modulation" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in trained.values() if id(p) not in chosen]
    made: list[Optimizer] = []
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=config.betas))
    return made


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Up over the warm-up, level, and down to 0 over the last share of the steps."""
    up = (step + 1) / max(1, config.warmup)
    down = (steps - step) / (config.decay * steps) if config.decay else 1.0
    return config.learning_rate * min(1.0, up, down)
