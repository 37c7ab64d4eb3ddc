"""CLIP vectors: equal to open_clip's own on towers with random weights, and steering by text."""

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from towers import ARCHITECTURES, made, open_clip, saved

from infdit_core import WeightsError, load_infdit, upscale
from infdit_core.cli import main
from infdit_core.images import read_picture
from infdit_core.infdit import InfDiT, InfDiTConfig, Preset, save_infdit
from infdit_core.semantics import (
    VIEWS,
    Clip,
    Phrase,
    Steering,
    download_clip,
    encode_prompt,
    load_clip,
    phrases,
    preprocess,
    steer,
)
from infdit_core.upscale import _say_ignored

CloseTo = Callable[..., None]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(saved(tmp_path_factory.mktemp("clip"), "small ViT"))


def pictures(height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- equality with open_clip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_are_those_of_open_clip(name: str, tmp_path: Path, assert_close: CloseTo) -> None:
    clip, expected = load_clip(saved(tmp_path, name)), made(name)
    assert clip.size == ARCHITECTURES[name]["embed_dim"]
    x = pictures(90, 130, count=2)
    texts = ["HD, high resolution, clear.", "noisy,blurry,low resolution.", "", "ein Fluß \U0001f99c"]
    with torch.no_grad():
        image = expected.encode_image(preprocess(x, clip.side), normalize=True)
        text = expected.encode_text(open_clip.tokenize(texts), normalize=True)
    assert_close(clip.encode_image(x), image, 1e-5)
    assert_close(clip.encode_text(texts), text, 1e-5)


def test_preprocessing_is_that_of_open_clip(assert_close: CloseTo) -> None:
    """Up to the 8 bits and the clamp between its steps, which Inf-DiT's training didn't have."""
    from torchvision.transforms.functional import to_pil_image

    smooth = F.interpolate(pictures(7, 9), size=(140, 180), mode="bicubic").clamp(-1, 1)
    image = to_pil_image(smooth[0] / 2 + 0.5)
    expected = open_clip.image_transform(64, is_train=False)(image)[None]
    assert_close(preprocess(smooth, 64), expected, 3 / 255 / 0.26)


def test_weights_may_be_smaller(tmp_path: Path) -> None:
    path = saved(tmp_path, "small ViT")
    exact, short = (
        load_clip(path, dtype=dtype).encode_image(pictures(64, 64)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert short.dtype == torch.float32
    assert F.cosine_similarity(exact, short) > 0.999


def test_many_pictures_can_be_stopped(small: Clip) -> None:
    x, parts = pictures(50, 70, count=17), []

    def stop(done: int, total: int) -> None:
        parts.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.encode_image(x, on_part=stop)
    assert parts == [(1, 3), (2, 3)]


def test_nothing_is_random(small: Clip) -> None:
    state = torch.get_rng_state()
    first = small.encode_image(pictures(50, 70)), small.encode_text(["a bird"])
    again = small.encode_image(pictures(50, 70)), small.encode_text(["a bird"])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# --- views


def test_views_of_a_square_are_the_same(small: Clip, assert_close: CloseTo) -> None:
    x = pictures(100, 100)
    centre = small.encode_image(x)
    for view in VIEWS:
        assert_close(small.encode_image(x, view), centre, 1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_views_of_a_wide_picture(small: Clip, turned: bool, assert_close: CloseTo) -> None:
    """Its left end is black, its middle grey, its right end white; so who sees what can be read off the pixels."""
    x = torch.cat([torch.full((1, 3, 100, 100), value) for value in (-1.0, 0.0, 1.0)], dim=3)
    x = x.transpose(2, 3) if turned else x

    def seen(view: Any) -> Tensor:
        y = preprocess(x, 64, view, (0.5,) * 3, (0.5,) * 3)
        return y.transpose(2, 3) if turned else y

    assert_close(seen("centre")[..., 4:-4], torch.zeros(1, 3, 64, 56), 1e-5)  # its ends see what was beside it
    squashed = seen("squash")[0, 0, 0]
    assert squashed[2] == pytest.approx(-1, abs=0.02)
    assert squashed[32] == pytest.approx(0, abs=0.1)
    assert squashed[61] == pytest.approx(1, abs=0.02)
    padded = seen("pad")[0, 0]
    assert torch.all(padded[:21] == 0)
    assert torch.all(padded[43:] == 0)
    assert padded[32, 2] == pytest.approx(-1, abs=0.02)
    squares = seen("squares")
    assert [round(float(s.mean()), 1) for s in squares] == [-1, -0.5, 0, 0.5, 1]  # overlapping by half

    both = small.encode_image(torch.cat([x, -x]), "squares")
    assert both.shape == (2, 48)
    assert_close(both.norm(dim=1), torch.ones(2), 1e-5)
    assert_close(both[:1], small.encode_image(x, "squares"), 1e-5)
    parts = [x.narrow(2 if turned else 3, start, 100) for start in (0, 50, 100, 150, 200)]
    mean = torch.stack([small.encode_image(part) for part in parts]).mean(0)
    assert_close(both[:1], F.normalize(mean, dim=-1), 1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 5)])
def test_any_size(small: Clip, size: tuple[int, int]) -> None:
    for view in VIEWS:
        vector = small.encode_image(pictures(*size), view)
        assert vector.shape == (1, 48)
        assert vector.norm() == pytest.approx(1, abs=1e-5)


def test_an_unknown_view_is_refused(small: Clip) -> None:
    with pytest.raises(ValueError, match="centre, squash, pad, squares"):
        small.encode_image(pictures(8, 8), "corner")  # type: ignore[arg-type]


# --- text


def test_phrases() -> None:
    assert phrases("a bird") == [Phrase("a bird", 1)]
    assert phrases("sharp, clear | (fine detail:1.5)\nfur|") == [
        Phrase("sharp, clear", 1),
        Phrase("fine detail", 1.5),
        Phrase("fur", 1),
    ]
    assert phrases("(a: b: 2)") == [Phrase("a: b", 2)]
    assert phrases("a (small) bird") == [Phrase("a (small) bird", 1)]
    assert phrases("(in brackets)") == [Phrase("(in brackets)", 1)]
    assert phrases(" | \n") == []
    for wrong in ("(a:b)", "(a:0)", "(a:nan)", "(a:-1)", "(a:1.2), (b:1.5)", "(a:1.2) and b"):
        with pytest.raises(ValueError, match="weight"):
            phrases(wrong)


def test_a_prompt_is_the_weighted_mean_of_its_phrases(small: Clip, assert_close: CloseTo) -> None:
    one, other = small.encode_text(["a bird", "a tree"]).split(1)
    found = encode_prompt(small, "a bird | (a tree:3)")
    assert found is not None
    assert_close(found, F.normalize(one + 3 * other, dim=-1), 1e-6)
    assert encode_prompt(small, "") is None


def test_steering_by_text(small: Clip, assert_close: CloseTo) -> None:
    image = small.encode_image(pictures(64, 64, count=2))
    good, bad = small.encode_text(["clear", "noisy"]).split(1)
    assert_close(Steering(small, "clear", "noisy", 1.5)(image), F.normalize(image + 1.5 * (good - bad), dim=-1), 1e-6)
    assert_close(Steering(small, "clear", "", 1.0)(image), F.normalize(image + good, dim=-1), 1e-6)
    assert_close(Steering(small, "", "noisy", 1.0)(image), F.normalize(image - bad, dim=-1), 1e-6)
    assert torch.equal(Steering(small, "clear", "noisy", 0.0)(image), image)
    assert torch.equal(Steering(small, " ", "|", 2.0)(image), image)
    assert torch.equal(steer(5 * image, good, bad, 0.0), F.normalize(5 * image, dim=-1))
    with pytest.raises(ValueError, match=r"768 numbers.*48"):
        Steering(small, "clear", "noisy")(torch.ones(1, 768))


def test_long_text_is_cut_and_said_so(small: Clip, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        short = small.encode_text(["bird " * 75])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert torch.equal(small.encode_text(["bird " * 75 + "and a tree"]), short)
    assert "75 tokens" in caplog.text
    assert "and a tree" in caplog.text
    started = time.process_time()
    for endless in ("a" * 10_000, "\U0001f99c" * 10_000, "bird " * 2000):
        small.encode_text([endless])
    assert "characters)" in caplog.text
    assert time.process_time() - started < 20


# --- files


def test_a_tower_inside_another_file(tmp_path: Path, assert_close: CloseTo) -> None:
    """As in the published Inf-DiT, which also brings pieces of the text tower that say nothing."""
    path = tmp_path / "infdit.safetensors"
    state = {f"image_encoder.model.{k}": v for k, v in made("small ViT").state_dict().items() if "resblocks" not in k}
    state |= {
        f"image_encoder.model.{k}": v for k, v in made("small ViT").state_dict().items() if k.startswith("visual.")
    }
    state["image_encoder.model.attn_mask"] = torch.zeros(77, 77)
    save_file(state | {"model.diffusion_model.x": torch.zeros(3)}, path)
    clip = load_clip(path)
    with torch.no_grad():
        expected = made("small ViT").encode_image(preprocess(pictures(64, 64), 64), normalize=True)
    assert_close(clip.encode_image(pictures(64, 64)), expected, 1e-5)
    with pytest.raises(ValueError, match=r"only the image tower.*open_clip_model\.safetensors"):
        clip.encode_text(["a bird"])


def test_quick_gelu_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_clip(saved(tmp_path, "small ViT"))
    assert not caplog.records
    load_clip(saved(tmp_path, "ResNet"))
    assert "QuickGELU" in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["token_embedding.weight", "positional_embedding"], "only a text tower"),
        (["vision_model.embeddings.class_embedding"], "Hugging Face"),
        (["layers.0.weight"], "no CLIP"),
        (["visual.trunk.stem.weight"], "open_clip_config"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, names: list[str], said: str) -> None:
    save_file({name: torch.zeros(3) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=said):
        load_clip(tmp_path / "other.safetensors")


def test_a_file_with_more_than_its_shapes_say_is_refused(tmp_path: Path) -> None:
    state = made("small ViT").state_dict() | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(128)}
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(WeightsError, match=r"ls_1\.gamma.*open_clip_config\.json"):
        load_clip(tmp_path / "clip.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model_cfg": {"embed_dim": 3}}',
        '{"model_cfg": {"embed_dim": 3, "vision_cfg": {"a": 1}, "text_cfg": {}}}',
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path, "small ViT")
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"open_clip_config\.json"):
        load_clip(path)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    state = made("small ViT").state_dict()
    del state["visual.ln_post.bias"]
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(WeightsError, match=r"visual\.ln_post\.bias is None"):
        load_clip(tmp_path / "clip.safetensors")


@pytest.mark.parametrize("answer", ["refused", "none"])
def test_no_network_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    from huggingface_hub import constants

    with socket.socket() as silent:  # takes connections, never answers
        silent.bind(("127.0.0.1", 0))
        if answer == "none":
            silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        started = time.monotonic()
        with pytest.raises(OSError, match=r"can't be downloaded.*by other means"):
            download_clip()
    assert time.monotonic() - started < 10


def test_open_clip_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, infdit_core, infdit_core.cli; sys.exit('open_clip' in sys.modules or 'torchvision' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_its_absence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for use in (lambda: load_clip(tmp_path / "x"), download_clip):
        with pytest.raises(ValueError, match="pip install open_clip_torch"):
            use()


# --- at the shell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, a network that listens to it, one that doesn't, and two photographs."""
    folder = tmp_path_factory.mktemp("shell")
    saved(folder, "small ViT")
    for name in ("listens", "deaf", "narrow"):
        generator = torch.Generator().manual_seed(0)
        model = InfDiT(replace(TINY, semantic_size=32) if name == "narrow" else TINY)
        model.initialise(generator)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            if name == "deaf":
                model.semantic_out.weight.zero_()
                model.semantic_out.bias.zero_()
        save_infdit(folder / f"{name}.safetensors", model)
    (folder / "photographs").mkdir()
    for number in range(2):
        image = F.interpolate(torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(number)), size=(48, 66))
        pixels = (image[0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "photographs" / f"{number}.png")
    return folder


TINY = InfDiTConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    block_size=16,
    semantic_size=48,
    parametrisation="residual",
    sigma_data=0.1,
    sigma_max=2.0,
    presets={"faithful": Preset(1), "balanced": Preset(2, 0.1)},
)


def upscaled(folder: Path, out: Path, *arguments: str, model: str = "listens") -> Tensor:
    source = str(folder / "photographs" / "0.png")
    command = [
        "upscale",
        source,
        "-o",
        str(out / "x.png"),
        "--model",
        str(folder / f"{model}.safetensors"),
        "--overwrite",
    ]
    assert main([*command, *arguments]) == 0
    return read_picture(out / "x.png").pixels


def test_upscale_listens_to_clip_and_prompts(
    folder: Path, tmp_path: Path, assert_close: CloseTo, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = ["--clip", str(folder / "clip.safetensors")]
    prompts = ["--prompt", "clear", "--negative", "noisy"]
    without = upscaled(folder, tmp_path)
    seen, steered = upscaled(folder, tmp_path, *clip), upscaled(folder, tmp_path, *clip, *prompts)
    squashed = upscaled(folder, tmp_path, *clip, "--view", "squash")
    for one, other in combinations((without, seen, steered, squashed), 2):
        assert (one - other).abs().max() > 1 / 255
    assert torch.equal(upscaled(folder, tmp_path, *clip, *prompts, "--strength", "0"), seen)

    x = read_picture(folder / "photographs" / "0.png").pixels[None]
    tower, network = load_clip(folder / "clip.safetensors"), load_infdit(folder / "listens.safetensors")
    vector = Steering(tower, "clear", "noisy")(tower.encode_image(x.movedim(-1, 1) * 2 - 1))
    assert_close(steered, upscale(x, model=network, scale=4, semantic=vector)[0], 1 / 255)
    capsys.readouterr()


def test_weights_without_semantics_say_so_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _say_ignored.cache_clear()
    clip = ["--clip", str(folder / "clip.safetensors")]
    assert torch.equal(upscaled(folder, tmp_path, *clip, model="deaf"), upscaled(folder, tmp_path, model="deaf"))
    upscaled(folder, tmp_path, "--prompt", "clear", model="deaf")
    assert [r.message for r in caplog.records if "without semantics" in r.message] == [caplog.records[0].message]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "clear", "--model", "listens.safetensors"], "--clip FILE"),
        (["--clip", "model", "--model", "listens.safetensors"], "holds no CLIP"),
        (["--clip", "clip.safetensors", "--model", "narrow.safetensors"], "48 numbers, and this network takes 32"),
        (["--clip", "clip.safetensors", "--model", "listens.safetensors", "--prompt", "(a:b)"], "weight"),
        (["--clip", "clip.safetensors", "--model", "listens.safetensors", "--prompt", "a", "--strength", "nan"], "nan"),
    ],
)
def test_what_the_shell_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    given = [str(folder / word) if word.endswith(".safetensors") else word for word in arguments]
    assert main(["upscale", str(folder / "photographs" / "0.png"), "-o", str(tmp_path / "x.png"), *given]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_eval_compares_with_and_without(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--semantics", "--original", str(folder / "photographs"), "--json", "--block", "16"]
    command += ["--model", str(folder / "listens.safetensors"), "--prompt", "clear"]
    assert main([*command, "--clip", str(folder / "clip.safetensors")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["pictures"]) == {"0", "1"}
    for key in ("psnr_y", "ssim_y", "seam_energy"):
        assert len({found["mean"][f"{name}_{key}"] for name in ("without", "with", "steered")}) == 3
    assert main(command) == 1
    assert "--clip FILE" in capsys.readouterr().err
    deaf = [word.replace("listens", "deaf") for word in command]
    assert main([*deaf, "--clip", str(folder / "clip.safetensors")]) == 1
    assert "trained without semantics" in capsys.readouterr().err


def test_vectors_that_do_not_fit_are_refused(folder: Path) -> None:
    network, images = load_infdit(folder / "listens.safetensors"), torch.zeros(2, 4, 4, 3)
    for vectors, said in ((torch.ones(3, 48), r"one vector, or 2"), (torch.full((1, 48), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=said):
            upscale(images, model=network, scale=2, semantic=vectors)
