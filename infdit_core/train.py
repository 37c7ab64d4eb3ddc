"""Train Inf-DiT on a folder of photographs: python -m infdit_core.train photographs=DIR out=DIR [key=value ...]

Killed at any moment, the same command goes on from the last save.
"""

import csv
import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .diffusion import edm
from .infdit.config import InfDiTConfig
from .infdit.model import InfDiT
from .training.data import Batch, CropSampler, Photograph, load_photographs


@dataclass
class TrainConfig:
    """What can be said on the command line."""

    photographs: str = ""
    out: str = ""
    steps: int = 6000
    decay_share: float = 0.3  # of the steps, at the end: the learning rate falls linearly to 0
    warmup: int = 100
    batch: int = 16
    crop: int = 96  # pixels
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.999
    regression_share: float = 0.25  # samples without noise, told sigma_max: the posterior mean itself
    sigma_log_mean: float = -2.4
    sigma_log_deviation: float = 1.2
    border_share: float = 0.2  # batches whose crops end like pictures do
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    block_size: int = 32
    held: int = 8  # photographs kept for validation
    validate_every: int = 250
    save_every: int = 250
    seed: int = 0
    optimizer: str = "adamw"


def main() -> None:
    c = TrainConfig()
    for a in sys.argv[1:]:
        k, v = a.split("=", 1)
        t = type(getattr(c, k))
        setattr(c, k, t(v))
    torch.manual_seed(c.seed)
    cfg = InfDiTConfig(hidden_size=c.hidden_size, num_layers=c.num_layers, num_heads=c.num_heads, block_size=c.block_size, parametrisation="residual", sigma_data=0.1, sigma_min=0.005, sigma_max=2.0)
    model = InfDiT(cfg)
    g = torch.Generator().manual_seed(c.seed)
    model.initialise(g)
    import copy
    ema = copy.deepcopy(model).requires_grad_(False)
    margin = c.block_size // 4
    t0 = time.time()
    photos = load_photographs(Path(c.photographs), 4, c.crop + 2 * c.block_size)
    hold = photos[:: len(photos) // c.held][: c.held]
    photos = [p for p in photos if p not in hold] if False else [p for i, p in enumerate(photos) if i % (len(photos) // c.held) or i // (len(photos) // c.held) >= c.held]
    print(f"loaded {len(photos)} + {len(hold)} held, {time.time()-t0:.0f}s", flush=True)
    sampler = CropSampler(photos, c.crop, 4, margin, c.seed)
    hs = CropSampler(hold, 192, 4, margin, 1)
    val = hs.batch(8)
    vn = torch.randn(val.original.shape, generator=torch.Generator().manual_seed(5))
    mats = [p for n, p in model.named_parameters() if p.ndim == 2 and ".modulation" not in n and n.startswith("layers")]
    ids = {id(p) for p in mats}
    rest = [p for p in model.parameters() if id(p) not in ids]
    if c.optimizer == "muon":
        opts = [torch.optim.Muon(mats, lr=c.learning_rate, weight_decay=c.weight_decay, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=c.learning_rate, weight_decay=c.weight_decay, betas=(0.9, 0.99), fused=True)]
    else:
        opts = [torch.optim.AdamW(model.parameters(), lr=c.learning_rate, weight_decay=c.weight_decay, betas=(0.9, 0.99), fused=True)]
    out = Path(c.out); out.mkdir(parents=True, exist_ok=True)
    step = 0; spent = 0.0
    st = out / "state.pt"
    if st.exists():
        s = torch.load(st)
        model.load_state_dict(s["model"]); ema.load_state_dict(s["ema"]); step = s["step"]; spent = s["spent"]
        for o, sd in zip(opts, s["opts"]): o.load_state_dict(sd)
        g.set_state(s["g"]); sampler.random.bit_generator.state = s["np"]
        print("resumed", step)
    t0 = time.time() - spent
    run = 0.0
    while step < c.steps:
        lr = c.learning_rate * min(1, (step + 1) / c.warmup, (c.steps - step) / (c.decay_share * c.steps))
        for o in opts:
            for gr in o.param_groups: gr["lr"] = lr
        b = sampler.batch(c.batch)
        sig = (c.sigma_log_mean + c.sigma_log_deviation * torch.randn(c.batch, generator=g)).exp().clamp(cfg.sigma_min, cfg.sigma_max)
        reg = torch.rand(c.batch, generator=g) < c.regression_share
        sig = torch.where(reg, torch.tensor(cfg.sigma_max), sig)
        noise = torch.randn(b.original.shape, generator=g)
        s4 = sig[:, None, None, None]
        noisy = torch.where(reg[:, None, None, None], b.upsampled, b.original + s4 * noise)
        lrs = b.low_res
        if torch.rand((), generator=g) < c.border_share:
            lrs = lrs[:, :, margin:-margin, margin:-margin]
        off = torch.randint(0, 512, (2,), generator=g).tolist()
        D = model.denoise(noisy, sig, lrs, upsampled=b.upsampled, offset=(off[0], off[1]))
        loss = (edm.loss_weight(sig, cfg.sigma_data) * ((D - b.original) ** 2).mean((1, 2, 3))).mean()
        for o in opts: o.zero_grad()
        loss.backward()
        gn = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        for o in opts: o.step()
        step += 1
        d = min(c.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
        run = loss.item() if run == 0 else run * 0.98 + loss.item() * 0.02
        if step % 50 == 0:
            print(f"{step} {time.time()-t0:.0f}s loss {run:.4f} gn {gn:.2f} lr {lr:.1e}", flush=True)
        if step % c.validate_every == 0 or step == c.steps:
            with torch.no_grad():
                ps = lambda a: (-10 * torch.log10((((a - val.original) / 2) ** 2).mean((1, 2, 3)))).mean().item()
                mean = ema.denoise(val.upsampled, cfg.sigma_max, val.low_res, upsampled=val.upsampled)
                dn = [ps(ema.denoise(val.original + s * vn, s, val.low_res, upsampled=val.upsampled)) for s in (0.05, 0.1, 0.3)]
                print(f"VAL {step} {time.time()-t0:.0f}s bicubic {ps(val.upsampled):.3f} mean {ps(mean):.3f} denoise {dn}", flush=True)
        if step % c.save_every == 0 or step == c.steps:
            tmp = st.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "opts": [o.state_dict() for o in opts], "step": step, "spent": time.time() - t0, "g": g.get_state(), "np": sampler.random.bit_generator.state}, tmp)
            os.replace(tmp, st)


if __name__ == "__main__":
    main()
