"""The command line as a person at a shell meets it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infdit_core import InfDiT, cli, load_infdit, upscale
from infdit_core.cli import main
from infdit_core.infdit import InfDiTConfig, Preset, save_infdit
from infdit_core.infdit.checkpoint import CLIP_PREFIX, ROPE_TABLES, SEMANTIC, convert, key_table
from infdit_core.weights import open_weights

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run(arguments...) -> exit status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network's file: one layer, residual, random."""
    config = InfDiTConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        block_size=16,
        semantic_size=8,
        parametrisation="residual",
        sigma_data=0.1,
        sigma_max=2.0,
        presets={"faithful": Preset(1), "balanced": Preset(2, 0.1)},
    )
    model = InfDiT(config)
    model.initialise(torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_infdit(path, model, metadata={"licence": "none"})
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)).save(path)
    return path


def sides(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_upscale_says_what_it_did(run: Run, photo: Path, weights: Path, tmp_path: Path) -> None:
    status, said, _ = run("upscale", photo, "-o", tmp_path / "out.png", "--model", weights)
    assert status == 0 and sides(tmp_path / "out.png") == (56, 36)
    assert "out.png: 14 x 9 -> 56 x 36" in said and "MiB" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--scale", 3.3], (46, 30)), (["--width", 28], (28, 18)), (["--width", 20, "--height", 30], (20, 30))],
)
def test_sizes(
    run: Run, photo: Path, weights: Path, tmp_path: Path, options: list[object], expected: tuple[int, int]
) -> None:
    assert run("upscale", photo, "-o", tmp_path / "out.png", "--model", weights, *options)[0] == 0
    assert sides(tmp_path / "out.png") == expected


def test_presets_and_seeds_are_reproducible(run: Run, photo: Path, weights: Path, tmp_path: Path) -> None:
    given = {"a": [], "b": ["--tile", 1], "c": ["--seed", 7], "d": ["--preset", "faithful"], "e": ["--detail", 0]}
    for name, options in given.items():
        run("upscale", photo, "-o", tmp_path / f"{name}.png", "--model", weights, *options)
    pixels = {name: np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in "abcde"}
    assert np.array_equal(pixels["a"], pixels["b"]) and np.array_equal(pixels["a"], pixels["e"])
    assert not np.array_equal(pixels["a"], pixels["c"]) and not np.array_equal(pixels["a"], pixels["d"])


def test_a_folder_goes_on_after_a_bad_file(run: Run, photo: Path, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    photo.rename(folder / "good.png")
    (folder / "bad.png").write_text("not a picture")
    (folder / "notes.txt").write_text("left alone")
    status, said, complaint = run("upscale", folder, "-o", tmp_path / "out", "--model", weights)
    assert status == 1 and "good.png" in said
    assert "bad.png" in complaint and "1 of 2" in complaint
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


def test_a_folder_goes_on_after_a_picture_too_large_for_the_memory(
    run: Run, photo: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    photo.rename(folder / "small.png")
    Image.new("RGB", (90, 90)).save(folder / "large.png")

    def full(image: torch.Tensor, **options: object) -> torch.Tensor:
        if image.shape[1] == 90:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return upscale(image, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cli, "upscale", full)
    status, said, complaint = run("upscale", folder, "-o", tmp_path / "out", "--model", weights)
    assert status == 1 and "small.png" in said and "1 of 2" in complaint
    assert "large.png: out of memory; choose a smaller result" in complaint


def test_nothing_is_lost(run: Run, photo: Path, weights: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    status, _, complaint = run("upscale", photo, "-o", photo, "--model", weights)
    assert status == 1 and "--overwrite" in complaint and photo.read_bytes() == before
    assert run("upscale", photo, "-o", photo, "--model", weights, "--overwrite")[0] == 0
    assert sides(photo) == (56, 36)
    (tmp_path / "two").mkdir()
    for name in ("a.png", "a.webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / "two" / name)
    status, _, complaint = run("upscale", tmp_path / "two", "-o", tmp_path / "out", "--model", weights)
    assert status == 1 and "would both become" in complaint


def test_bad_input_says_what_to_do(run: Run, photo: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.touch()
    text.write_text("hello")
    (tmp_path / "nothing").mkdir()
    for arguments, code, said in [
        ([empty], 1, "is empty"),
        ([text], 1, "not a picture"),
        ([tmp_path / "none.png"], 1, "doesn't exist"),
        ([tmp_path / "nothing"], 1, "holds no picture"),
        ([photo, "--scale", "0"], 2, "not a positive number"),
        ([photo, "--scale", "-1"], 2, "not a positive number"),
        ([photo, "--scale", "nan"], 2, "not a positive number"),
        ([photo, "--scale", "1e6"], 1, "smaller scale"),
        ([photo, "--detail", "nan"], 1, "it must be a share"),
        ([photo, "--detail", "0.5"], 1, "have no detailer"),
        ([photo, "--scale", "2", "--width", "9"], 1, "either"),
        ([photo, "--preset", "best"], 1, "faithful, balanced"),
        ([photo, "--sampler", "magic"], 1, "dpmpp_2m"),
        ([photo, "--tile", "0"], 2, "number of blocks"),
        ([photo, "--device", "toaster"], 1, "auto, cpu or cuda"),
        ([photo, "--model", tmp_path / "none.pt"], 1, "doesn't exist"),
        ([photo, "--model", photo], 1, "photo.png"),
    ]:
        options = [] if "--model" in arguments else ["--model", weights]
        status, _, complaint = run("upscale", *arguments, "-o", out, *options)
        assert status == code and said in complaint, complaint
        assert "Traceback" not in complaint and not out.exists()
    for target, said in [("out.xyz", "can't write"), ("none/out.png", "doesn't exist")]:
        assert said in run("upscale", photo, "-o", tmp_path / target, "--model", weights)[2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_a_full_disk_leaves_nothing(
    run: Run, photo: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: open(full, mode, buffering=0))  # noqa: PTH123, SIM115
    status, _, complaint = run("upscale", photo, "-o", tmp_path / "out.png", "--model", weights)
    assert status == 1 and "No space left" in complaint
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]


def test_interrupt_stops_and_leaves_nothing(photo: Path, weights: Path, tmp_path: Path) -> None:
    Image.new("RGB", (900, 900)).save(photo)
    command = [sys.executable, "-m", "infdit_core", "upscale", photo, "-o", tmp_path / "out.png", "--model", weights]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen([*command, "--tile", "1"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert "s left" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in complaint and "Traceback" not in complaint
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]


# --- weights files


@pytest.fixture
def published(weights: Path, tmp_path: Path) -> Path:
    """A file in the published layout: DeepSpeed's, bf16, RoPE tables, unused tensors and a CLIP tower."""
    file = open_weights(weights)
    tensors = {name: file.read(name) for name in file.shapes}
    unused = load_infdit(weights).state_dict()
    tensors |= {disk: unused[code].bfloat16() for disk, code in key_table(1).items() if disk in SEMANTIC}
    tensors |= dict.fromkeys(ROPE_TABLES, torch.zeros(64, 64, 8, dtype=torch.bfloat16))
    tensors["mixins.adaln_layer.k_layer_norm.0.weight"] = torch.ones(8, dtype=torch.bfloat16)
    tensors["transformer.position_embeddings.weight"] = torch.ones(5, 16, dtype=torch.bfloat16)
    tensors |= {CLIP_PREFIX + name: torch.rand(6, 4).bfloat16() for name in ("visual.proj", "visual.class_embedding")}
    torch.save({"module": tensors, "iteration": 7}, tmp_path / "published.pt")
    return tmp_path / "published.pt"


def test_info(run: Run, weights: Path, published: Path, photo: Path) -> None:
    status, said, _ = run("info", weights)
    assert status == 0 and "1 layers, hidden 16, 2 heads, block 16 px" in said
    assert "bfloat16" in said and "residual" in said and "says licence: none" in said
    status, said, _ = run("info", published)
    assert status == 0 and "PyTorch" in said and "48 parameters" in said and "k_layer_norm.0.weight" in said
    assert run("info", photo)[0] == 1


def test_convert(run: Run, published: Path, tmp_path: Path) -> None:
    out, tower = tmp_path / "out.safetensors", tmp_path / "clip.safetensors"
    assert run("convert", published, out)[0] == 0
    file = open_weights(out)
    assert not set(ROPE_TABLES) & set(file.shapes)
    assert CLIP_PREFIX + "visual.proj" in file.shapes and "published.pt" in file.metadata["converted_from"]
    assert load_infdit(out).config == load_infdit(published).config and load_infdit(out).config.rope_side == 64
    for name, value in load_infdit(out).state_dict().items():
        assert torch.equal(value, load_infdit(published).state_dict()[name])

    assert run("convert", published, out, "--clip", tower)[0] == 1, "without --overwrite"
    assert run("convert", published, out, "--clip", tower, "--overwrite", "--dtype", "float32")[0] == 0
    assert set(open_weights(tower).shapes) == {"visual.proj", "visual.class_embedding"}
    assert set(key_table(1)) <= set(open_weights(out).shapes)
    assert set(open_weights(out).dtypes.values()) == {torch.float32}
    assert run("convert", out, out, "--overwrite")[0] == 1, "onto itself"
    assert "no CLIP tower" in run("convert", out, tmp_path / "x.safetensors", "--clip", tmp_path / "y")[2]


def test_convert_holds_one_tensor_at_a_time(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infdit_core import weights as module

    alive: list[int] = []
    save = module.save_weights

    def watched(path: Path, layout: object, tensors: object, metadata: object) -> None:
        import weakref

        seen: list[weakref.ref[torch.Tensor]] = []

        def watch() -> object:
            for tensor in tensors:  # type: ignore[attr-defined]
                seen.append(weakref.ref(tensor))
                alive.append(sum(ref() is not None for ref in seen))
                yield tensor
                del tensor

        save(path, layout, watch(), metadata)  # type: ignore[arg-type]

    monkeypatch.setattr("infdit_core.infdit.checkpoint.save_weights", watched)
    convert(published, tmp_path / "out.safetensors", dtype=torch.float32)
    assert len(alive) > 20 and max(alive) <= 2, "the one being written and the one just read"


# --- measuring


def test_eval(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    pixels = rng.integers(50, 200, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    Image.fromarray(pixels + 5).save(tmp_path / "b" / "x.png")
    status, said, _ = run("eval", "--original", tmp_path / "a", "--upscaled", tmp_path / "b", "--json")
    figures = json.loads(said)["mean"]
    assert status == 0 and figures["psnr_y"] == pytest.approx(20 * np.log10(255 / (219 * 5 / 255)), abs=1e-3)
    assert set(figures) == {"psnr_y", "ssim_y", "seam_energy"}
    Image.fromarray(pixels).save(tmp_path / "b" / "x.png")
    same = json.loads(run("eval", "--original", tmp_path / "a", "--upscaled", tmp_path / "b", "--json")[1])["mean"]
    assert same["psnr_y"] is None and same["ssim_y"] == pytest.approx(1)
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "x.png")
    assert "8 x 8, its original 80 x 80" in run("eval", "--original", tmp_path / "a", "--upscaled", tmp_path / "b")[2]
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    said = run("eval", "--original", tmp_path / "a", "--upscaled", tmp_path / "b")[2]
    assert "x.png: SSIM needs pictures of at least 19" in said
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "x.webp")
    said = run("eval", "--original", tmp_path / "a", "--upscaled", tmp_path / "b")[2]
    assert "x.png and" in said and "can't be told apart" in said


def test_bench(run: Run) -> None:
    status, said, _ = run("bench", "--network", "nano", "--size", "64x32", "--rounds", "1", "--json")
    results = json.loads(said)["results"]
    assert status == 0 and [result["case"]["tile"] for result in results] == [None, [1, 1]]
    for result in results:
        assert result["seconds"] > 0 and result["share_of_matmul"] > 0 and result["flops"] > 1e9
    assert "multiples of the block" in run("bench", "--network", "nano", "--size", "50x32")[2]
