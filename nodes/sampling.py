"""EDM's sampler and schedule as the host's SAMPLER and SIGMAS."""

from typing import Any

from comfy_api.latest import io

from ..infdit_core.diffusion import edm
from . import host


class EDMHeunSampler(io.ComfyNode):
    """Algorithm 2 of arXiv 2206.00364 as SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTHeunSampler",
            display_name="EDM Heun Sampler",
            category="image/upscaling/Inf-DiT",
            description="EDM's second-order sampler, with fresh noise on the way where wanted, for "
            "'Inf-DiT Upscale (tiled)', SamplerCustom and SamplerCustomAdvanced. The network runs twice a step, once "
            "in the last.",
            inputs=[
                io.Float.Input(
                    "s_churn",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="How much fresh noise the steps add, shared out among them; 0 adds none.",
                ),
                io.Float.Input(
                    "s_tmin",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Fresh noise only where sigma is at least this.",
                ),
                io.Float.Input(
                    "s_tmax",
                    default=1000.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Fresh noise only where sigma is at most this.",
                ),
                io.Float.Input(
                    "s_noise",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.001,
                    tooltip="Strength of the fresh noise; slightly above 1 keeps detail from fading.",
                ),
            ],
            outputs=[io.Sampler.Output(id="sampler", display_name="sampler", tooltip="The way from noise to picture.")],
        )

    @classmethod
    def execute(cls, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> io.NodeOutput:
        return io.NodeOutput(host.heun_sampler(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise))


class EDMSchedule(io.ComfyNode):
    """Equation 5 of arXiv 2206.00364 over the weights' own range, as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTSchedule",
            display_name="EDM Schedule",
            category="image/upscaling/Inf-DiT",
            description="EDM's noise levels (sigmas) over the range that the network was trained for. In "
            "'Inf-DiT Upscale (tiled)' a start below the largest begins with a first estimate of the result: few "
            "steps are enough then.",
            inputs=[
                io.Model.Input("model", tooltip="From 'Load Inf-DiT': its weights say which sigmas they know."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="More is finer, and takes longer."),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Sigma to start from, the deviation of the noise in a picture of -1 to 1; 0 is the "
                    "largest that the weights know.",
                ),
            ],
            outputs=[io.Sigmas.Output(id="sigmas", display_name="sigmas", tooltip="Noise levels, falling to 0.")],
        )

    @classmethod
    def execute(cls, model: Any, steps: int, start: float) -> io.NodeOutput:
        config = host.network_of(model).config
        if start and not config.sigma_min < start <= config.sigma_max:
            raise ValueError(
                f"Start is {start:g}: these weights take 0, or a sigma above {config.sigma_min:g} and up to "
                f"{config.sigma_max:g}."
            )
        return io.NodeOutput(edm.sigmas(steps, config.sigma_min, start or config.sigma_max))
