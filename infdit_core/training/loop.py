"""The training loop: Muon and AdamW on the EDM loss, an average of the weights, saved so that it can go on."""

import copy
import csv
import time
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion import edm
from ..infdit.checkpoint import load_infdit, save_infdit
from ..infdit.config import InfDiTConfig
from ..infdit.model import InfDiT
from ..weights import write_atomically
from .config import NANO, TrainConfig
from .data import Batch, CropSampler, load_photographs
from .losses import denoising_loss

_VALIDATION_SIGMAS = (0.05, 0.1, 0.3)


class Run:
    """Everything that changes while training."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        if config.start_from:
            self.model = load_infdit(config.start_from).train().requires_grad_(True)
        else:
            self.model = InfDiT(NANO)
            self.model.initialise(self.generator)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        # Muon for the matrices inside the layers; the rest, and what only embeds or modulates, by AdamW.
        matrices = [
            p
            for n, p in self.model.named_parameters()
            if n.startswith("layers.") and p.ndim == 2 and ".modulation" not in n
        ]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        rate, decay = config.learning_rate, config.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=(0.9, 0.99)),
        ]
        # Every so-and-so-many-th photograph is held back for validation.
        photographs = load_photographs(
            Path(config.photographs), self.network.scale, 2 * (config.crop + self.network.block_size)
        )
        every = max(2, len(photographs) // config.held)
        held = photographs[::every][: config.held]
        names = {photograph.name for photograph in held}
        margin = self.network.block_size // self.network.scale
        self.crops = CropSampler(
            [p for p in photographs if p.name not in names], config.crop, self.network.scale, margin, config.seed
        )
        self.validation = CropSampler(held, 2 * config.crop, self.network.scale, margin, seed=1).batch(config.held)
        self.step = 0
        self.seconds = 0.0

    @property
    def network(self) -> InfDiTConfig:
        return self.model.config

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
            "crops": self.crops.random.bit_generator.state,
        }
        write_atomically(path, lambda file: torch.save(state, file))

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.generator.set_state(state["generator"])
        self.crops.random.bit_generator.state = state["crops"]

    def advance(self) -> tuple[float, float]:
        """One step; returns loss and gradient norm."""
        config = self.config
        rate = config.learning_rate * min(
            1, (self.step + 1) / config.warmup, (config.steps - self.step) / (config.decay * config.steps)
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        loss = self._loss(self.crops.batch(config.batch))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item(), norm.item()

    def _loss(self, batch: Batch) -> Tensor:
        config, generator, count = self.config, self.generator, len(batch.original)
        sigma = (config.sigma_log_mean + config.sigma_log_deviation * torch.randn(count, generator=generator)).exp()
        sigma = sigma.clamp(self.network.sigma_min, self.network.sigma_max)
        regressed = torch.rand(count, generator=generator) < config.regression
        sigma = torch.where(regressed, self.network.sigma_max, sigma)
        noise = torch.randn(batch.original.shape, generator=generator)
        noisy = torch.where(
            regressed[:, None, None, None], batch.upsampled, batch.original + sigma[:, None, None, None] * noise
        )
        low_res = batch.low_res
        if torch.rand((), generator=generator) < config.border:
            margin = self.crops.margin
            low_res = low_res[:, :, margin:-margin, margin:-margin]
        # Any offset that keeps the crop's positions clear of the wrap.
        largest = self.network.rope_side - config.crop // self.network.patch_size
        row, column = torch.randint(0, largest + 1, (2,), generator=generator).tolist()
        denoised = self.model.denoise(noisy, sigma, low_res, upsampled=batch.upsampled, offset=(row, column))
        weight = edm.loss_weight(sigma, self.network.sigma_data)
        return denoising_loss(denoised, batch.original, weight).mean()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB on crops of the held photographs: of the mean, and of denoising at some levels."""
        held = self.validation
        noise = torch.randn(held.original.shape, generator=torch.Generator().manual_seed(5))

        def psnr(x: Tensor) -> float:
            return float(-10 * ((x - held.original) / 2).square().mean((1, 2, 3)).log10().mean())

        def denoise(noisy: Tensor, sigma: float) -> Tensor:
            return self.average.denoise(noisy, sigma, held.low_res, upsampled=held.upsampled)

        figures = {
            "psnr_bicubic": psnr(held.upsampled),
            "psnr_mean": psnr(denoise(held.upsampled, self.network.sigma_max)),
        }
        return figures | {f"psnr_sigma_{s:g}": psnr(denoise(held.original + s * noise, s)) for s in _VALIDATION_SIGMAS}


def train(config: TrainConfig) -> Path:
    """Train, or go on where the run in config.out stopped; returns the path of the weights (the average, bf16)."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    state, weights = out / "state.pt", out / "weights.safetensors"
    run = Run(config)
    if state.exists():
        run.restore(state)
        print(f"going on from step {run.step}", flush=True)
    started = time.monotonic() - run.seconds
    losses: list[float] = []
    while run.step < config.steps:
        loss, norm = run.advance()
        run.seconds = time.monotonic() - started
        losses.append(loss)
        last = run.step == config.steps
        if run.step % config.validate_every == 0 or last:
            figures = run.validate()
            row = {
                "step": run.step,
                "seconds": round(run.seconds),
                "loss": sum(losses) / len(losses),
                "gradient_norm": norm,
                **figures,
            }
            losses.clear()
            _log(out / "log.csv", row)
            print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        if run.step % config.save_every == 0 or last:
            run.save(state)
            trained = {
                "steps": str(run.step),
                "crops": f"{run.step * config.batch} of {config.crop} px",
                "hours": f"{run.seconds / 3600:.2f}",
            }
            save_infdit(weights, run.average, metadata=trained)
    return weights


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
