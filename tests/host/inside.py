"""Checks that run inside a host's process, with its interpreter: python inside.py HOST PACK FOLDER [measure].

Prints one JSON line: the name of every check, and the traceback where it failed. `test_inside.py` reads it. With
"measure" it compares the cost of the streaming node with the library's instead.
"""

import asyncio
import gc
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

CHECKS: list[Callable[[Any], None]] = []


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CHECKS.append(function)
    return function


TARGET = {"size_by": "scale", "scale": 4.0, "width": 0, "height": 0, "longest_side": 4096}
TILED = TARGET | {"preset": "balanced", "seed": 3, "tile": 0, "colour": "none"}


def picture(height: int, width: int, channels: int = 3, batch: int = 1, seed: int = 0) -> Any:
    import torch

    smooth = torch.rand(batch, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear").movedim(1, -1).clamp(0, 1)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    distance = (a.float() - b.float()).abs().max().item()
    assert distance <= tolerance, f"{distance:.3g} away, {tolerance:.3g} allowed"


@contextmanager
def says(*parts: str) -> Iterator[None]:
    """The block raises a ValueError of one sentence or two that holds the parts."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        message = str(error)
        assert "\n" not in message and len(message) < 400, message
        assert all(part in message for part in parts), message
    else:
        raise AssertionError(f"nothing was raised that says {parts}")


# --- nodes


@check
def every_node_explains_itself(h: Any) -> None:
    for name, node in h.nodes.items():
        schema = node.GET_SCHEMA()
        assert name.startswith("InfDiT") and schema.display_name and schema.description, name
        assert all(i.tooltip for i in schema.inputs), name
        assert all(o.id and o.display_name and o.tooltip for o in schema.outputs), name


@check
def one_node_gives_what_the_library_gives(h: Any) -> None:
    for shape in [(7, 11, 3), (1, 1, 3), (8, 8, 4), (9, 5, 1)]:
        image = picture(*shape)
        found = h.run("InfDiTUpscale", image=image, scale=3.0, preset="balanced")
        close(found, h.core.upscale(image, scale=3.0))
        assert found.dtype == h.torch.float32 and found.shape == (1, 3 * shape[0], 3 * shape[1], shape[2])


@check
def tiled_gives_the_same_for_every_tile(h: Any) -> None:
    image = picture(9, 20, batch=2)
    expected = h.core.upscale(image, scale=4.0, seed=3)
    for tile in (0, 1, 50):
        close(h.run("InfDiTUpscaleTiled", model=h.default(), image=image, **TILED | {"tile": tile}), expected)


@check
def targets(h: Any) -> None:
    image = picture(6, 9)
    for target, size in [
        ({"scale": 2.5}, (15, 22)),
        ({"scale": 0.5}, (3, 4)),
        ({"size_by": "width and height", "width": 27}, (18, 27)),
        ({"size_by": "width and height", "height": 12}, (12, 18)),
        ({"size_by": "width and height", "width": 20, "height": 21}, (21, 20)),
        ({"size_by": "longest side", "longest_side": 45}, (30, 45)),
    ]:
        settings = TILED | target | {"preset": "faithful"}
        found = h.run("InfDiTUpscaleTiled", model=h.default(), image=image, **settings)
        assert found.shape[1:3] == size, (target, found.shape)
        latent = h.run_all("InfDiTConditioning", model=h.default(), image=image, **TARGET | target)[1]
        assert h.run("InfDiTToImage", samples=latent).shape[1:3] == size, target


@check
def inputs_are_left_alone_and_may_be_views(h: Any) -> None:
    image = picture(24, 16).transpose(1, 2).flip(2)
    before = image.clone()
    found = h.run("InfDiTUpscaleTiled", model=h.default(), image=image, **TILED | {"colour": "wavelet"})
    close(image, before, 0)
    close(found, h.run("InfDiTUpscaleTiled", model=h.default(), image=before, **TILED | {"colour": "wavelet"}))


# --- the native path


def sampled(h: Any, model: Any, image: Any, steps: int, seed: int, cfg: float = 1.0, **options: Any) -> Any:
    import nodes

    positive, latent = h.run_all("InfDiTConditioning", model=model, image=image, **TARGET | options)
    (samples,) = nodes.KSampler().sample(model, seed, steps, cfg, "heun", "karras", positive, positive, latent, 1.0)
    return h.run("InfDiTToImage", samples=samples)


@check
def ksampler_with_heun_and_karras_is_edm_heun(h: Any) -> None:
    """For the published parametrisation and the shipped weights' own."""
    samplers, edm = h.core.diffusion.samplers, h.core.diffusion.edm
    evaluation = sys.modules[f"{h.core.__name__}.evaluation"]
    for model in (h.default(), h.model("picture.safetensors")):
        network = model.model.diffusion_model
        config = network.config
        image = picture(config.block_size // 2, config.block_size // 4 * 3)  # two by three blocks
        low_res = image.movedim(-1, 1) * 2 - 1
        upsampled = h.core.images.resize(low_res, (4 * image.shape[1], 4 * image.shape[2])).clamp(-1, 1)
        sigmas = edm.sigmas(4, config.sigma_min, config.sigma_max)
        noise = h.torch.randn(upsampled.shape, generator=h.torch.Generator().manual_seed(11))

        plan = evaluation.MemoryPlan(network, (image.shape[1], image.shape[2]), None)

        def denoise(x: Any, sigma: Any, network: Any = network, low_res: Any = low_res, plan: Any = plan) -> Any:
            return evaluation.denoise(network, plan, x, sigma, low_res, network.upsample(low_res))

        expected = samplers.heun(denoise, upsampled + sigmas[0] * noise, sigmas).clamp(-1, 1).add(1).div(2)
        found = sampled(h, model, image, steps=4, seed=11)
        close(found, expected.movedim(1, -1), 1e-4 if config.parametrisation == "picture" else 1e-5)
        close(h.schedule(model, "karras", 4), h.run("InfDiTSchedule", model=model, steps=4, start=0.0), 1e-3)
        close(sampled(h, model, image, steps=4, seed=11, cfg=3.0), found, 1e-4)  # guidance is the identity


@check
def a_picture_is_predicted_once_a_sampling_and_not_kept(h: Any) -> None:
    model, asked = h.default(), []
    network, image = model.model.diffusion_model, picture(16, 16, batch=2)
    real = network.upsample
    network.upsample = lambda *given, **named: asked.append(given) or real(*given, **named)
    for number in (1, 2):
        sampled(h, model, image, steps=3, seed=11, cfg=3.0)
        assert len(asked) == number * 2, len(asked)  # of two pictures, for positive and negative
        assert not model.model.refined


@check
def our_sampler_and_schedule_drive_both_paths_alike(h: Any) -> None:
    import torch
    from comfy_extras.nodes_custom_sampler import BasicGuider, Noise_RandomNoise, SamplerCustomAdvanced

    model, image = h.default(), picture(16, 16)
    sigmas = h.run("InfDiTSchedule", model=model, steps=4, start=0.0)
    for churn in (0.0, 8.0):
        sampler = h.run("InfDiTHeunSampler", s_churn=churn, s_tmin=0.0, s_tmax=1000.0, s_noise=1.0)
        tiled = h.run("InfDiTUpscaleTiled", model=model, image=image, **TILED, sampler=sampler, sigmas=sigmas)
        conditioning, latent = h.run_all("InfDiTConditioning", model=model, image=image, **TARGET)
        with torch.inference_mode():  # the latent is bicubic, while the other path starts from the predicted picture
            latent["samples"] = model.model.diffusion_model.upsample(image.movedim(-1, 1) * 2 - 1)
        (guider,) = h.call(BasicGuider, model=model, conditioning=conditioning)
        inputs = {"noise": Noise_RandomNoise(3), "guider": guider, "sampler": sampler, "sigmas": sigmas}
        done = h.call(SamplerCustomAdvanced, **inputs, latent_image=latent)[0]
        close(h.run("InfDiTToImage", samples=done), tiled, 1e-5)


@check
def samplers_of_the_host_drive_the_tiled_upscaler(h: Any) -> None:
    import comfy.samplers

    model, image = h.default(), picture(8, 8)
    sigmas = h.run("InfDiTSchedule", model=model, steps=3, start=0.5)
    ours = h.run("InfDiTHeunSampler", s_churn=0.0, s_tmin=0.0, s_tmax=1000.0, s_noise=1.0)
    own = h.run("InfDiTUpscaleTiled", model=model, image=image, **TILED, sampler=ours, sigmas=sigmas)
    names = ["heun", "euler", "euler_ancestral", "euler_cfg_pp", "dpmpp_2m_sde", "dpm_fast", "lcm", "er_sde", "uni_pc"]
    for name in names:
        sampler = comfy.samplers.sampler_object(name)
        found = h.run("InfDiTUpscaleTiled", model=model, image=image, **TILED, sampler=sampler, sigmas=sigmas)
        assert found.isfinite().all() and found.shape == own.shape, name
        if name == "heun":
            close(found, own)


@check
def native_takes_batches_transparency_and_any_size(h: Any) -> None:
    image = picture(13, 22, channels=4, batch=2)
    found = sampled(h, h.default(), image, steps=2, seed=1, scale=3.3)
    assert found.shape == (2, 43, 73, 4) and found.min() >= 0 and found.max() <= 1
    close(found[..., 3:], h.core.upscale(image, scale=3.3, preset="faithful")[..., 3:])
    assert sampled(h, h.default(), image[:1, :5, :5], steps=1, seed=1, scale=7.0).shape == (1, 35, 35, 4)


# --- the host's management


@check
def partial_loading_changes_nothing(h: Any) -> None:
    """As on a card too small for the weights: modules left behind cast theirs at use."""
    image = picture(16, 24)
    for name, preset in ((h.shipped, "balanced"), ("picture.safetensors", "faithful")):  # one evaluation
        model = h.model(name)
        settings = TILED | {"preset": preset, "tile": 1}
        whole = h.run("InfDiTUpscaleTiled", model=model, image=image, **settings)
        model.detach()
        model.load(h.torch.device("cpu"), lowvram_model_memory=1000)
        network = model.model.diffusion_model
        casting = [m for m in network.modules() if getattr(m, "comfy_cast_weights", False)]
        assert len(casting) > 5, "nothing was left behind"
        found = h.core.upscale(image, model=network, scale=4.0, preset=preset, seed=3, tile=1)
        close(found, whole, 0)
        model.detach()


@check
def precisions(h: Any) -> None:
    image = picture(16, 16)
    exact = h.run("InfDiTUpscaleTiled", model=h.model(h.shipped, "fp32"), image=image, **TILED)
    for precision, tolerance in [("auto", 0.02), ("bf16", 0.02), ("fp16", 0.02), ("fp8", 0.1)]:
        model = h.model(h.shipped, precision)
        found = h.run("InfDiTUpscaleTiled", model=model, image=image, **TILED)
        close(found, exact, tolerance)
        kinds = {p.dtype for p in model.model.diffusion_model.parameters()}
        assert precision == "auto" or h.host.PRECISIONS[precision] in kinds, (precision, kinds)
        assert sampled(h, model, image, steps=1, seed=1).isfinite().all()
    # The predictor and the detailer, a fifth of the weights, stay as they are.
    assert h.model(h.shipped, "fp8").model_size() < 0.45 * h.model(h.shipped, "fp32").model_size()


@check
def out_of_memory_lowers_the_tile(h: Any) -> None:
    image = picture(20, 20)
    expected = h.run("InfDiTUpscaleTiled", model=h.default(), image=image, **TILED)
    original, tiles = h.InfDiT.denoise, []

    def short(self: Any, *args: Any, **options: Any) -> Any:
        tiles.append((options["tile"], options["cache_device"]))
        if tiles[-1] != ((1, 1), "cpu"):
            raise h.torch.OutOfMemoryError("injected")
        return original(self, *args, **options)

    h.InfDiT.denoise = short
    try:
        close(h.run("InfDiTUpscaleTiled", model=h.default(), image=image, **TILED), expected)
        assert len(tiles) > 3
        expected = sampled_before(h, image, original, short)
        tiles.clear()
        close(sampled(h, h.default(), image, steps=3, seed=1), expected)
        assert tiles[-5:] == [((1, 1), "cpu")] * 5, "later evaluations go on with what fitted"
        h.InfDiT.denoise = lambda *_, **__: (_ for _ in ()).throw(h.torch.OutOfMemoryError("injected"))
        with says("MiB", "smaller result"):
            h.run("InfDiTUpscaleTiled", model=h.default(), image=image, **TILED)
    finally:
        h.InfDiT.denoise = original


def sampled_before(h: Any, image: Any, original: Any, short: Any) -> Any:
    h.InfDiT.denoise = original
    try:
        return sampled(h, h.default(), image, steps=3, seed=1)
    finally:
        h.InfDiT.denoise = short


@check
def samplers_of_the_host_draw_other_noise_than_the_start(h: Any) -> None:
    seeds = []

    class Probe:
        def sample(
            self, guider: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, latent: Any, *_: Any
        ) -> Any:
            seeds.append(extra_args["seed"])
            return latent

    for seed in (3, 2**64 - 1):
        settings = TILED | {"seed": seed, "sigmas": h.torch.tensor([0.1, 0.0])}
        h.run("InfDiTUpscaleTiled", model=h.default(), image=picture(4, 4), sampler=Probe(), **settings)
        own = h.run("InfDiTHeunSampler", s_churn=8.0, s_tmin=0.0, s_tmax=1000.0, s_noise=1.0)
        h.run("InfDiTUpscaleTiled", model=h.default(), image=picture(4, 4), sampler=own, **settings)
    assert set(seeds) == {4, 1}  # also asked once to count its evaluations


@check
def interrupt_stops_at_the_next_tile(h: Any) -> None:
    """A block may finish, whatever the host's own operations check."""
    import comfy.model_management as management

    model, image = h.default(), picture(40, 40)
    for run in (
        lambda: h.run("InfDiTUpscaleTiled", model=model, image=image, **TILED | {"tile": 1}),
        lambda: sampled(h, model, image, steps=2, seed=1),
    ):
        original, tiles = h.InfDiT.run_tile, []

        def counted(self: Any, *args: Any, original: Any = original, tiles: list[int] = tiles, **options: Any) -> Any:
            tiles.append(1)
            if len(tiles) == 2:
                management.interrupt_current_processing(True)
            return original(self, *args, **options)

        h.InfDiT.run_tile = counted
        try:
            run()
        except management.InterruptProcessingException:
            assert len(tiles) <= 2, len(tiles)
            assert not model.model.refined
        else:
            raise AssertionError("it ran to the end")
        finally:
            h.InfDiT.run_tile = original
            management.interrupt_current_processing(False)


@check
def progress_grows_and_shows_the_picture(h: Any) -> None:
    import comfy.utils

    seen: list[tuple[float, float, Any]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total, preview)))
    try:
        h.run("InfDiTUpscaleTiled", model=h.default(), image=picture(20, 150), **TILED | {"tile": 1})
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    values = [value for value, _, _ in seen]
    assert values == sorted(values) and values[-1] == seen[-1][1] and len(values) > 50
    previews = [preview for _, _, preview in seen if preview is not None]
    assert previews and all(kind == "JPEG" and max(image.size) <= 512 for kind, image, _ in previews)


@check
def nothing_is_left_behind(h: Any) -> None:
    """Neither tensors, nor a state of the global random generator."""
    model = h.default()

    def large() -> int:
        gc.collect()
        return sum(isinstance(o, h.torch.Tensor) and o.numel() > 50_000 for o in gc.get_objects())

    before, state = large(), h.torch.get_rng_state()
    h.run("InfDiTUpscaleTiled", model=model, image=picture(36, 36), **TILED | {"tile": 1})
    assert large() <= before
    assert h.torch.equal(h.torch.get_rng_state(), state)


@check
def memory_is_estimated_and_flat_in_length(h: Any) -> None:
    need = h.model("picture.safetensors").model.memory_required
    assert 0 < need([1, 3, 128, 128]) < need([1, 3, 512, 512])
    network = h.model("picture.safetensors").model.diffusion_model
    sizes = [((32, 64 * n), (128, 256 * n)) for n in (2, 8, 32)]
    estimates = [h.working_memory(network, start, end, 1) for start, end in sizes]
    assert estimates[0] == estimates[1] == estimates[2] > 0


# --- files, and what can go wrong


@check
def folder_lists_the_shipped_default_first(h: Any) -> None:
    import folder_paths

    names = h.host.model_names()
    assert names[0] == h.shipped and "picture.safetensors" in names and "notes.txt" not in names, names
    added = str(h.folder / "elsewhere")
    folder_paths.add_model_folder_path("infdit", added)  # what extra_model_paths.yaml does, before packs load
    h.host.register_model_folder()
    paths, extensions = folder_paths.folder_names_and_paths["infdit"]
    assert added in paths and len(paths) == 2 and ".safetensors" in extensions


@check
def a_file_that_changes_is_loaded_again(h: Any) -> None:
    loader = h.nodes["InfDiTLoader"]
    name = "changing.safetensors"
    path = h.infdit / name
    shutil.copy(h.infdit / "picture.safetensors", path)
    first = loader.fingerprint_inputs(model_name=name, precision="auto")
    assert first == loader.fingerprint_inputs(model_name=name, precision="auto")
    os.utime(path, (1, 1))
    assert first != loader.fingerprint_inputs(model_name=name, precision="auto")
    assert loader.validate_inputs(model_name=name) is True
    path.unlink()
    assert "put it into" in loader.validate_inputs(model_name=name)
    with says(name, str(h.infdit), h.shipped):
        h.run("InfDiTLoader", model_name=name, precision="auto")


@check
def bad_inputs_get_a_sentence(h: Any) -> None:
    good, model = picture(8, 8), h.default()
    for node in ("InfDiTUpscaleTiled", "InfDiTConditioning"):
        settings = TILED if node == "InfDiTUpscaleTiled" else TARGET
        for image, parts in [
            (good[:0], ("(0, 8, 8, 3)",)),
            (good * h.torch.nan, ("NaN",)),
            (picture(8, 8, channels=5), ("1 to 4",)),
            (good[0], ("shape",)),
        ]:
            with says(*parts):
                h.run(node, model=model, image=image, **settings)
        for target, parts in [
            ({"scale": 0.0}, ("scale is 0",)),
            ({"scale": 1e9}, ("too large",)),
            ({"size_by": "width and height"}, ("width, a height or both",)),
            ({"size_by": "magic"}, ("longest side",)),
        ]:
            with says(*parts):
                h.run(node, model=model, image=good, **settings | target)
        other = SimpleNamespace(model=SimpleNamespace(diffusion_model=h.torch.nn.Linear(1, 1)))
        with says("Load Inf-DiT"):
            h.run(node, model=other, image=good, **settings)
    for settings, parts in [
        ({"preset": "best"}, ("balanced",)),
        ({"colour": "red"}, ("wavelet",)),
        ({"sigmas": h.torch.tensor([1.0, 2.0])}, ("smaller than the one before",)),
        ({"sigmas": h.torch.tensor([])}, ("sigmas",)),
    ]:
        with says(*parts):
            h.run("InfDiTUpscaleTiled", model=model, image=good, **TILED | settings)
    with says("semantic", "8 numbers"):
        listening = h.model("picture.safetensors")
        h.run("InfDiTUpscaleTiled", model=listening, image=good, semantic=h.torch.zeros(1, 3), **TILED)
    with says("sigma"):
        h.run("InfDiTSchedule", model=model, steps=3, start=500.0)
    with says("VAE Decode"):
        h.run("InfDiTToImage", samples={"samples": h.torch.zeros(1, 4, 8, 8)})
    with says("precision".capitalize()):
        h.model(h.shipped, "int3")
    for name, parts in [("clip.safetensors", ("not an Inf-DiT file",)), ("short.pt", ("cut short",))]:
        with says(name, *parts):
            h.run("InfDiTLoader", model_name=name, precision="auto")


@check
def the_native_path_explains_wrong_connections(h: Any) -> None:
    import nodes

    model, text = h.default(), [[h.torch.zeros(1, 1, 1), {}]]
    conditioning, latent = h.run_all("InfDiTConditioning", model=model, image=picture(8, 8), **TARGET)
    four = {"samples": h.torch.ones(1, 4, 8, 8)}
    smaller = {"samples": latent["samples"][:, :, :16]}
    for positive, negative, cfg, samples, parts in [
        (conditioning, conditioning, 1.0, four, ("4 channels", "Inf-DiT Conditioning")),
        (conditioning, conditioning, 1.0, smaller, ("32 x 16", "Inf-DiT Conditioning")),
        (text, text, 1.0, latent, ("needs the picture",)),
        (conditioning, text, 2.0, latent, ("negative",)),
    ]:
        with says(*parts):
            nodes.KSampler().sample(model, 1, 1, cfg, "heun", "karras", positive, negative, samples, 1.0)


# --- semantics


@check
def clip_is_loaded_by_the_host_and_leaves(h: Any) -> None:
    import comfy.model_management as management

    if h.open_clip is None:
        with says("pip install open_clip_torch"):
            h.run("InfDiTLoadCLIP", clip_name="tower.safetensors")
        return
    clip, image = h.run("InfDiTLoadCLIP", clip_name="tower.safetensors"), picture(20, 30, channels=4, batch=2)
    if hasattr(clip.patcher, "get_ram_usage"):  # v0.3.64 has no such cache
        assert clip.get_ram_usage() > 1000, "the host's cache can't tell how much it holds"
    expected = h.semantics.load_clip(h.infdit / "tower.safetensors")
    x = image.movedim(-1, 1)[:, :3] * 2 - 1
    for view in ("centre", "squares"):
        found = h.run("InfDiTSemanticEncode", image=image, view=view, clip=clip)
        close(found, expected.encode_image(x, view))
    text = {"positive": "clear | (sharp:2)", "negative": "noisy", "strength": 1.5}
    steered = h.run("InfDiTTextSteering", semantic=found, clip=clip, **text)
    close(steered, h.semantics.Steering(expected, *text.values())(found))
    same = h.run("InfDiTTextSteering", semantic=found, clip=clip, **text | {"strength": 0.0})
    assert h.torch.equal(same, found)
    _, report = h.host.steer(clip, found, *text.values())
    before, after = ([float(line.split()[i]) for line in report.splitlines()[1:]] for i in (1, 3))
    assert after[0] - after[1] > before[0] - before[1], report  # in a random tower the two may look alike
    assert not [m for m in management.current_loaded_models if m.model is clip.patcher]
    for wrong in (h.default(), None):
        with says("Load CLIP (Inf-DiT)"):
            h.run("InfDiTSemanticEncode", image=image, view="centre", clip=wrong)
    with says("clip.safetensors", "no CLIP"):
        h.run("InfDiTLoadCLIP", clip_name="clip.safetensors")


@check
def both_paths_listen_to_semantics(h: Any) -> None:
    model, image = h.model("picture.safetensors"), picture(8, 8)
    vectors = h.torch.eye(8)[:2]
    tiled = [
        h.run("InfDiTUpscaleTiled", model=model, image=image, **TILED, semantic=v)
        for v in (vectors[:1], vectors[1:], None)
    ]
    native = [sampled(h, model, image, steps=2, seed=1, semantic=v) for v in (vectors[:1], vectors[1:], None)]
    for results in (tiled, native):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (results[one] - results[other]).abs().max() > 1e-3
    both = picture(8, 8, batch=2)
    found = h.run("InfDiTUpscaleTiled", model=model, image=both, **TILED, semantic=vectors)
    alone = h.run("InfDiTUpscaleTiled", model=model, image=both[1:], **TILED, semantic=vectors[1:])
    close(found[1:], alone)
    for node in ("InfDiTUpscaleTiled", "InfDiTConditioning"):  # the shipped weights don't listen
        settings = TILED if node == "InfDiTUpscaleTiled" else TARGET
        deaf = [h.run(node, model=h.default(), image=image, **settings, semantic=v) for v in (vectors[:, :3], None)]
        close(*(x if node == "InfDiTUpscaleTiled" else x[0][1][h.host.LOW_RES] for x in deaf), 0)


@check
def clip_vision_is_used_where_its_activation_fits(h: Any) -> None:
    import comfy.clip_vision

    settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256}
    settings |= {"patch_size": 16, "image_size": 64, "num_channels": 3, "projection_dim": 8}
    for activation in ("gelu", "quick_gelu"):
        path = h.infdit / "vision.json"
        path.write_text(json.dumps(settings | {"hidden_act": activation, "model_type": "clip_vision_model"}))
        vision = comfy.clip_vision.ClipVisionModel(path)
        generator = h.torch.Generator().manual_seed(0)
        for parameter in vision.model.parameters():
            parameter.data.normal_(std=0.1, generator=generator)
        inputs = {"image": picture(64, 64, batch=2), "view": "centre", "clip_vision": vision}
        if activation == "gelu":
            found = h.run("InfDiTSemanticEncode", **inputs)
            expected = vision.encode_image(inputs["image"])["image_embeds"]
            close(found, h.torch.nn.functional.normalize(expected, dim=-1), 2e-2)  # it rounds to 8 bits before
        else:
            with says("another activation"):
                h.run("InfDiTSemanticEncode", **inputs)


# --- running them


class Helper:
    """What the checks use: the host with the pack in it."""

    def __init__(self, pack: Path, folder: Path) -> None:
        import folder_paths
        import torch

        import nodes

        self.torch, self.folder = torch, folder
        folder_paths.models_dir = str(folder / "models")
        self.infdit = folder / "models" / "infdit"
        import comfy_config.config_parser  # noqa: F401  # the host needs it for the first pack, whichever that is

        started = time.monotonic()
        loaded = asyncio.run(nodes.load_custom_node(str(pack)))
        self.seconds = time.monotonic() - started
        assert loaded, "the host refused the pack"
        self.nodes = {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("InfDiT")}
        prefix = str(pack).replace(".", "_x_")
        self.host = sys.modules[f"{prefix}.nodes.host"]
        self.core = sys.modules[f"{prefix}.infdit_core"]
        self.working_memory = sys.modules[f"{prefix}.infdit_core.upscale"].working_memory
        self.semantics = self.core.semantics
        self.InfDiT = self.core.InfDiT
        self.shipped = self.host.SHIPPED
        self._files()

    def _files(self) -> None:
        """A network of the published kind, small and random, with a predictor, and files that are none."""
        from safetensors.torch import save_file

        torch, infdit = self.torch, sys.modules[self.core.__name__ + ".infdit"]
        config = self.core.InfDiTConfig(
            hidden_size=32,
            num_layers=3,
            num_heads=2,
            block_size=16,
            semantic_size=8,
            time_channels=16,
            predictor_width=4,
            predictor_depth=1,
            predictor_condition=2,
        )
        network = self.InfDiT(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=max(0.1, parameter[0].numel() ** -0.5), generator=generator)
            for module in network.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.weight.add_(1)
        infdit.save_infdit(self.infdit / "picture.safetensors", network, torch.float32)
        save_file({"text_model.weight": torch.zeros(2)}, self.infdit / "clip.safetensors")
        try:
            import open_clip
        except ImportError:
            open_clip = None
        self.open_clip = open_clip
        if open_clip is not None:
            vision = {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16}
            tower = open_clip.CLIP(8, vision, {"width": 64, "heads": 1, "layers": 1})
            save_file(dict(tower.state_dict()), self.infdit / "tower.safetensors")
        (self.infdit / "short.pt").write_bytes(b"PK\x03\x04 nothing")
        (self.infdit / "notes.txt").write_text("no weights")

    def values(self, output: Any) -> Any:
        return getattr(output, "args", output)

    def run_all(self, name: str, **inputs: Any) -> Any:
        """All outputs of a node, run as the host runs it."""
        with self.torch.inference_mode():
            return self.values(self.nodes[name].execute(**inputs))

    def call(self, node: Any, **inputs: Any) -> Any:
        """All outputs of a node of the host's own, which may be of the old kind."""
        return self.values(
            node.execute(**inputs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(**inputs)
        )

    def run(self, name: str, **inputs: Any) -> Any:
        return self.run_all(name, **inputs)[0]

    def model(self, name: str, precision: str = "auto") -> Any:
        return self.run("InfDiTLoader", model_name=name, precision=precision)

    def default(self) -> Any:
        return self.model(self.shipped)

    def schedule(self, model: Any, name: str, steps: int) -> Any:
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps)


def measure(h: Any) -> None:
    """Time and memory of the streaming node beside the library's, on the same picture in turn: medians of five."""
    memory = sys.modules[f"{h.core.__name__}.memory"]
    image, cpu = picture(135, 240), h.torch.device("cpu")
    model, network = h.default(), h.core.load_infdit()
    ways = {
        "library": lambda: h.core.upscale(image, model=network, scale=4.0, seed=3),
        "node": lambda: h.run("InfDiTUpscaleTiled", model=model, image=image, **TILED),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(6):
        for name, way in ways.items():
            memory.reset_peak_memory(cpu)
            before, started = memory.peak_memory(cpu), time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
            peaks[name].append((memory.peak_memory(cpu) - before) / 2**20)
    for name in ways:  # the first round warms up
        print(f"{name}: {median(seconds[name][1:]):.2f} s of CPU, {median(peaks[name][1:]):.0f} MiB more")
    ratio = median(b / a for a, b in zip(seconds["library"][1:], seconds["node"][1:], strict=True))
    print(f"node / library: time {ratio:.3f}, memory {median(peaks['node'][1:]) / median(peaks['library'][1:]):.3f}")


def main(host: str, pack: str, folder: str, what: str = "checks") -> None:
    """Load the pack as the host does, and run every check, or `measure`."""
    host, pack, folder = (str(Path(path).resolve()) for path in (host, pack, folder))
    (Path(folder) / "models" / "infdit").mkdir(parents=True)
    os.chdir(host)
    sys.path.insert(0, host)
    sys.argv = [sys.argv[0]]
    from comfy.cli_args import args

    args.cpu = True
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    helper = Helper(Path(pack), Path(folder))
    if what == "measure":
        measure(helper)
        return
    results: dict[str, str | None] = {}
    for function in CHECKS:
        started = time.monotonic()
        try:
            with torch.inference_mode():
                function(helper)
            results[function.__name__] = None
        except Exception:
            results[function.__name__] = traceback.format_exc()
        print(f"{function.__name__}: {time.monotonic() - started:.1f} s", flush=True)
    print(json.dumps({"results": results, "import_seconds": helper.seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
