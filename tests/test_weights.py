"""Weights files: published ones load to the last tensor, broken ones are told apart, and no file can run anything."""

import io
import json
import os
import pickle
import random
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from infdit_core.infdit import InfDiT, InfDiTConfig, Preset, load_infdit, save_infdit
from infdit_core.infdit.checkpoint import (
    CLIP_PREFIX,
    ROPE_TABLES,
    SEMANTIC,
    dropped_keys,
    key_table,
    read_config,
    unused_keys,
)
from infdit_core.weights import WeightsError, WeightsFile, open_weights, save_weights

SIDE = 24  # of the tables of rotary positions in the small files here

MakeModel = Callable[..., InfDiT]


def published_tensors(model: InfDiT, *, tower: bool = False) -> dict[str, Tensor]:
    """A network's tensors as the published file has them, with all that isn't read."""
    config, state = model.config, model.state_dict()
    tensors = {disk: state[code] for disk, code in key_table(config.num_layers).items()}
    for name in dropped_keys(config.num_layers):
        tensors[name] = torch.full((config.head_size,), 7.0)
    tensors |= {name: torch.zeros(SIDE, SIDE, config.head_size) for name in ROPE_TABLES}
    if tower:
        tensors |= {
            CLIP_PREFIX + "logit_scale": torch.tensor(4.6),
            CLIP_PREFIX + "visual.conv1.weight": torch.ones(8, 3, 2, 2),
        }
    return {name: t.bfloat16() for name, t in tensors.items()}


def deepspeed(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What DeepSpeed puts around the tensors of a model."""
    return {
        "module": OrderedDict(tensors),
        "buffer_names": list(ROPE_TABLES),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, t.shape) for name, t in tensors.items())],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 100,
        "global_samples": 6400,
        "dp_world_size": 8,
        "mp_world_size": 1,
        "ds_config": {"bf16": {"enabled": True}, "optimizer": {"params": {"betas": [0.9, 0.999]}}},
        "ds_version": "0.12.3",
        "iteration": 100,
    }


def random_states() -> dict[str, Any]:
    """What SwissArmyTransformer's training, which the published weights come from, adds to DeepSpeed's."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002  (the very thing that is stored)
        "torch_rng_state": torch.get_rng_state(),
        "client_lr_scheduler": {"start_lr": 1e-4, "num_iters": 100},
    }


def assert_same_network(one: InfDiT, other: InfDiT) -> None:
    assert one.config == other.config
    state, wanted = one.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(state[name], t), name


@pytest.fixture
def model(tiny_model: MakeModel) -> InfDiT:
    """A small network whose weights bfloat16 holds exactly, as load_infdit answers it."""
    made = InfDiT(tiny_model(rope_side=SIDE).config)
    made.load_state_dict({name: t.bfloat16().float() for name, t in tiny_model(rope_side=SIDE).state_dict().items()})
    return made


# --- the published file


@pytest.fixture(scope="module")
def manifest(golden_folder: Path) -> dict[str, Any]:
    """Names and shapes in the published file."""
    content: dict[str, Any] = json.loads((golden_folder / "manifest_published.json").read_text())
    return content


def published_file(manifest: dict[str, Any], *parts: str) -> WeightsFile:
    def read(name: str) -> Tensor:
        raise AssertionError(f"{name} was read to find out what the file is")

    entries = [entry for part in parts for entry in manifest[part]]
    return WeightsFile(
        Path("mp_rank_00_model_states.pt"),
        "PyTorch",
        {entry["key"]: tuple(entry["shape"]) for entry in entries},
        {entry["key"]: getattr(torch, entry["dtype"]) for entry in entries},
        {},
        read,
    )


def test_published_hyper_parameters(manifest: dict[str, Any]) -> None:
    """The published file says what it is by its shapes alone, and the defaults are its hyper-parameters."""
    assert read_config(published_file(manifest, "dit")) == InfDiTConfig()


def test_every_published_key_is_accounted_for(manifest: dict[str, Any]) -> None:
    """A key under a wrong name: the network loads without it, or not at all."""
    names = [entry["key"] for entry in manifest["dit"]]
    assert len(names) == len(set(names)) == 426
    used, dropped = key_table(28), dropped_keys(28)
    assert set(used) | set(dropped) == set(names)
    assert not set(used) & set(dropped)
    assert sorted(used.values()) == sorted(InfDiT(InfDiTConfig(), device="meta").state_dict())
    buffers = {entry["key"] for entry in manifest["dit"] if entry["kind"] == "buffer"}
    assert set(ROPE_TABLES) == buffers


@pytest.mark.parametrize("parts", [("dit",), ("dit", "image_encoder")])
def test_published_shapes_fit(manifest: dict[str, Any], parts: tuple[str, ...]) -> None:
    """As above for shapes; and what is left aside is named, with the CLIP tower or without."""
    unused = unused_keys(published_file(manifest, *parts), InfDiTConfig())
    tower = [name for name in unused if name.startswith("image_encoder.model.")]
    assert len(tower) == (300 if "image_encoder" in parts else 0)
    assert set(unused) - set(tower) == set(dropped_keys(28))
    assert all(unused.values()), "without a reason"


def test_published_number_of_parameters(manifest: dict[str, Any]) -> None:
    """The network has the published size, in all and in every part."""
    model = InfDiT(InfDiTConfig(), device="meta")
    parts = manifest["dit_parameter_count_by_part"]
    sizes = {
        "transformer.layers": ("qkv", "attention_out", "mlp_in", "mlp_out"),
        "adaLN_modulations": ("modulation",),
        "time_embed + cond_embed": ("time_in", "time_out", "semantic_in", "semantic_out"),
        "final_layer": ("final", "final_modulation"),
        "patch_embed": ("patch_embed",),
    }
    for part, modules in sizes.items():
        found = sum(p.numel() for name, p in model.named_parameters() if f".{name}".split(".")[-2] in modules)
        assert found == parts[part], part
    dead = sum(count for part, count in parts.items() if "(dead)" in part)
    assert sum(p.numel() for p in model.parameters()) == manifest["dit_parameter_count"] - dead


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_deepspeed_file_loads(tmp_path: Path, model: InfDiT, tower: bool, zipped: bool) -> None:
    """The file as people download it, with and without the CLIP tower, also in PyTorch's old format."""
    path, twin = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "twin.safetensors"
    tensors = published_tensors(model, tower=tower)
    torch.save(deepspeed(tensors), path, _use_new_zipfile_serialization=zipped)
    save_file(tensors, twin)
    found = load_infdit(path)
    assert_same_network(found, model)
    assert_same_network(load_infdit(twin), found)
    assert found.config.rope_side == SIDE
    assert not found.training
    assert {(p.dtype, p.requires_grad) for p in found.parameters()} == {(torch.float32, False)}
    assert {p.dtype for p in load_infdit(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_random_states_beside_the_weights_do_no_harm(tmp_path: Path, model: InfDiT) -> None:
    """A checkpoint out of a training run holds numpy's random state: plain numbers, no reason to refuse it."""
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(deepspeed(published_tensors(model)) | random_states(), path)
    assert_same_network(load_infdit(path), model)


@pytest.mark.parametrize("entry", ["module", "state_dict", "model", None])
def test_where_tensors_are(tmp_path: Path, model: InfDiT, entry: str | None) -> None:
    """Other people's conversions put the tensors elsewhere."""
    path, tensors = tmp_path / "weights.pth", published_tensors(model)
    torch.save({entry: tensors} if entry else tensors, path)
    assert_same_network(load_infdit(path), model)


def test_nothing_is_read_before_it_is_needed(tmp_path: Path, model: InfDiT) -> None:
    """`info` on a file of gigabytes, and choosing one from a list, would take minutes."""
    tensors = published_tensors(model, tower=True)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"title": "a"})
    torch.save({"module": tensors}, tmp_path / "a.pt")
    for name, kind in (("a.safetensors", "safetensors"), ("a.pt", "PyTorch")):
        file = open_weights(tmp_path / name)
        assert file.format == kind
        assert file.shapes == {key: tuple(t.shape) for key, t in tensors.items()}
        assert set(file.dtypes.values()) == {torch.bfloat16}
        for key, t in tensors.items():
            assert torch.equal(file.read(key), t)
    assert open_weights(tmp_path / "a.safetensors").metadata == {"title": "a"}


# --- our own file


def test_round_trip(tmp_path: Path, tiny_model: MakeModel) -> None:
    """Saved weights come back as they were, with all that shapes don't say."""
    path = tmp_path / "own.safetensors"
    presets = {"faithful": Preset(1), "balanced": Preset(4, 0.3), "detailed": Preset(9, 1.5)}
    weights = tiny_model(rope_side=77).state_dict()
    settings = {"parametrisation": "residual", "sigma_data": 0.1, "sigma_min": 0.005, "sigma_max": 2.0}
    config = InfDiTConfig(
        hidden_size=16,
        num_layers=3,
        num_heads=2,
        block_size=16,
        semantic_size=8,
        rope_side=77,
        presets=presets,
        **settings,
    )
    model = InfDiT(config)
    model.load_state_dict(weights)
    save_infdit(path, model, torch.float32, {"title": "a test"})
    assert_same_network(load_infdit(path), model)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(key_table(3))
    assert metadata["title"] == "a test"
    assert metadata["architecture"] == "infdit"

    save_infdit(path, model)  # over the old one, now in bfloat16
    again = load_infdit(path)
    assert again.config == config
    for name, t in again.state_dict().items():
        assert torch.equal(t, weights[name].bfloat16().float())


def test_what_no_semantics_change_is_left_out(tmp_path: Path, tiny_model: MakeModel) -> None:
    model, path = tiny_model(), tmp_path / "own.safetensors"
    model.semantic_out.weight.data.zero_()
    model.semantic_out.bias.data.zero_()
    save_infdit(path, model, torch.float32)
    assert set(key_table(3)) - set(open_weights(path).shapes) == set(SEMANTIC)
    again = load_infdit(path)
    assert again.config == model.config and not again.uses_semantics
    assert again.semantic_in.weight.std() > 0.1  # it can be trained
    noisy, low_res = torch.rand(1, 3, 32, 16), torch.rand(1, 3, 8, 4)
    vector = torch.rand(1, 8)
    expected = model.denoise(noisy, 0.3, low_res, semantic=vector)
    assert torch.equal(again.denoise(noisy, 0.3, low_res, semantic=vector), expected)


def test_a_file_that_lost_what_takes_up_semantics_is_refused(tmp_path: Path, tiny_model: MakeModel) -> None:
    """One whose metadata doesn't speak of it, as the published one's."""
    path = tmp_path / "own.safetensors"
    save_infdit(path, tiny_model(), torch.float32)
    save_file({name: tensor for name, tensor in load_file(path).items() if name not in SEMANTIC}, path)
    with pytest.raises(WeightsError, match=r"missing: cond_embed\.map_vector\.0\.weight"):
        load_infdit(path)


def test_modules_may_wait_for_their_tensors(tmp_path: Path, tiny_model: MakeModel) -> None:
    """As those of a host that loads lazily."""

    class Lazy(nn.Linear):
        def __init__(self, *sizes: int, **factory: Any) -> None:
            super().__init__(*sizes, **factory)
            del self.weight, self.bias

        def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
            self.weight, self.bias = (nn.Parameter(state[prefix + part]) for part in ("weight", "bias"))

    model, path = tiny_model(), tmp_path / "own.safetensors"
    model.semantic_out.weight.data.zero_()
    model.semantic_out.bias.data.zero_()
    save_infdit(path, model, torch.float32)
    operations = SimpleNamespace(Linear=Lazy, Conv2d=nn.Conv2d, LayerNorm=nn.LayerNorm)
    again = load_infdit(path, operations=operations)
    noisy, low_res = torch.rand(1, 3, 32, 16), torch.rand(1, 3, 8, 4)
    assert torch.equal(again.denoise(noisy, 0.3, low_res), model.denoise(noisy, 0.3, low_res))


def test_what_is_computed_survives_the_file(tmp_path: Path, tiny_model: MakeModel) -> None:
    """A file that loads into another network than was saved."""
    model = tiny_model(parametrisation="residual", sigma_data=0.1)
    path = tmp_path / "own.safetensors"
    save_infdit(path, model, torch.float32)
    noisy, low_res = torch.rand(1, 3, 32, 16), torch.rand(1, 3, 8, 4)
    assert torch.equal(load_infdit(path).denoise(noisy, 0.3, low_res), model.denoise(noisy, 0.3, low_res))


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 24, "num_heads": 3},
        {"hidden_size": 16, "num_heads": 4},
        {"num_layers": 1},
        {"patch_size": 2},
        {"block_size": 32},
        {"scale": 2},
        {"semantic_size": 3},
        {"time_channels": 10},
    ],
)
def test_hyper_parameters_from_shapes(tmp_path: Path, shape: dict[str, int]) -> None:
    """Every size of network that training can make loads without being told what it is."""
    config = InfDiTConfig(**({"hidden_size": 16, "num_layers": 2, "num_heads": 2, "block_size": 16} | shape))  # type: ignore[arg-type]
    path = tmp_path / "shape.safetensors"
    save_infdit(path, InfDiT(config))
    assert load_infdit(path).config == config


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": "{"},
        {"config": "[1]"},
        {"config": json.dumps({"colour": "red"})},
        {"config": json.dumps({"parametrisation": "wavelet"})},
        {"presets": "[1]"},
        {"presets": json.dumps({"fast": {"speed": 2}})},
    ],
    ids=lambda metadata: next(iter(metadata.values())),
)
def test_unknown_metadata_is_refused(tmp_path: Path, model: InfDiT, metadata: dict[str, str]) -> None:
    """A file of a later version would load, and draw nonsense."""
    path = tmp_path / "later.safetensors"
    save_file(published_tensors(model), path, metadata=metadata)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load_infdit(path)


# --- files with something wrong


@pytest.mark.parametrize(
    "name",
    [
        "mixins.patch_embed.proj.bias",
        "mixins.adaln_layer.cross_q_ln.weight",
        "transformer.layers.2.mlp.dense_h_to_4h.weight",
        "mixins.adaln_layer.re_pos_embed",
        "time_embed.mlp.0.weight",
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_missing_tensor_is_named(tmp_path: Path, model: InfDiT, name: str, suffix: str) -> None:
    """The published code loads such files and answers noise."""
    path, tensors = tmp_path / f"less{suffix}", published_tensors(model)
    del tensors[name]
    if suffix == ".pt":
        torch.save({"module": tensors}, path)
    else:
        save_file(tensors, path)
    with pytest.raises(WeightsError, match=re.escape(name)):
        load_infdit(path)


def test_an_unknown_tensor_is_named(tmp_path: Path, model: InfDiT) -> None:
    """As above: what the code doesn't know it would leave out."""
    path, name = tmp_path / "more.safetensors", "mixins.adaln_layer.gates.0.weight"
    save_file(published_tensors(model) | {name: torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=f"unknown: {re.escape(name)}"):
        load_infdit(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.layers.1.attention.dense.weight", (16, 15)),
        ("mixins.adaln_layer.cross_attention.key_value.bias", (16,)),
        ("mixins.final_layer.linear.bias", (1, 48)),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, model: InfDiT, name: str, shape: tuple[int, ...]) -> None:
    """As above, with both shapes, so that one sees whose network this is."""
    path, tensors = tmp_path / "shape.safetensors", published_tensors(model)
    right = tuple(tensors[name].shape)
    save_file(tensors | {name: torch.zeros(shape)}, path)
    with pytest.raises(WeightsError, match=re.escape(f"{name} has shape {shape} instead of {right}")):
        load_infdit(path)


@pytest.mark.parametrize(
    "name",
    [
        "mixins.adaln_layer.re_pos_embed",
        "mixins.patch_embed.proj.weight",
        "mixins.adaln_layer.lr_query_position_embedding",
        "cond_embed.map_vector.0.weight",
    ],
)
@pytest.mark.parametrize("shape", [(), (5,), (1, 5, 2, 8)])
def test_shapes_that_say_no_size(tmp_path: Path, model: InfDiT, name: str, shape: tuple[int, ...]) -> None:
    """As above, for the tensors that hyper-parameters are read off."""
    path = tmp_path / "shape.safetensors"
    save_file(published_tensors(model) | {name: torch.zeros(shape)}, path)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load_infdit(path)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    """The wrong file chosen from a list: say what it is instead of 424 missing names."""
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "other.safetensors")
    torch.save(tensors, tmp_path / "other.pt")
    for name in ("other.safetensors", "other.pt"):
        with pytest.raises(WeightsError, match=r"not an Inf-DiT file.*model\.diffusion_model\.input_blocks"):
            load_infdit(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"module": {}}, {"epoch": 3}, torch.zeros(3), {"module": {"a": 1}}])
def test_a_file_without_tensors(tmp_path: Path, content: object) -> None:
    """As above for PyTorch files, which can hold anything."""
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="no tensors"):
        load_infdit(tmp_path / "none.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2600000000\n",
        b"PK\x03\x04 not a zip",
        b"\x80\x02.",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 7) + b'{"a":1}',
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, suffix: str, content: bytes) -> None:
    """An error page saved under the file's name, or a download that never began: named with its path."""
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load_infdit(path)


def test_no_file(tmp_path: Path) -> None:
    """A typing error in a path."""
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors doesn't exist"):
        load_infdit(tmp_path / "nowhere.safetensors")
    with pytest.raises(WeightsError, match="is a folder"):
        load_infdit(tmp_path)


def small_file(kind: str) -> bytes:
    tensors = {name: torch.arange(6.0).reshape(2, 3) for name in ("a.weight", "b.weight", "c.weight")}
    if kind == "safetensors":
        return save(tensors)
    buffer = io.BytesIO()
    torch.save({"module": tensors}, buffer, _use_new_zipfile_serialization=kind == "zipped")
    return buffer.getvalue()


KINDS = ["safetensors", "zipped", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short(tmp_path: Path, kind: str) -> None:
    """A download that broke off, wherever it did."""
    whole, path = small_file(kind), tmp_path / "part"
    path.write_bytes(whole)
    assert len(open_weights(path).shapes) == 3
    for length in {*range(1, len(whole) - 1, max(1, len(whole) // 60)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            open_weights(path)


@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, deadline=None, max_examples=100)
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged(tmp_path_factory: pytest.TempPathFactory, kind: str, places: list[tuple[float, int]]) -> None:
    """A bad disk: the file opens, or it is refused as what it is, but nothing else is thrown."""
    content = bytearray(small_file(kind))
    for place, value in places:
        content[int(place * len(content))] = value
    path = tmp_path_factory.getbasetemp() / f"damaged_{kind}"
    path.write_bytes(content)
    try:
        file = open_weights(path)
    except WeightsError as error:
        assert str(path) in str(error)
    else:
        assert file.shapes


# --- files that want to run something


class Runs:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zipped", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, model: InfDiT, kind: str, suffix: str) -> None:
    """Whoever gets a user to load a file would own the machine."""
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "marker"
    content = {"module": published_tensors(model), "extra": Runs(f'echo > "{marker}"')}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"module": {"a": 1}, "extra": content["extra"]}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zipped")
    with pytest.raises(WeightsError) as refusal:
        load_infdit(path)
    assert not marker.exists()
    if suffix == ".pt":  # under the other name it is no safetensors file in the first place
        said = str(refusal.value)
        assert "refused, and nothing in it was executed" in said and "system" in said
        assert not re.search("still be loaded|likely succeed|\x1b", said), "torch's advice to load it all the same"

    harmful = path.rename(tmp_path / "harmful.pt")
    if kind == "pickle":
        pickle.loads(harmful.read_bytes())
    else:
        torch.load(harmful, weights_only=False)
    assert marker.exists(), "this file was harmless: the test shows nothing"


def test_an_archive_with_a_foreign_pickle(tmp_path: Path) -> None:
    """As above, packed by hand into the archive that PyTorch files are."""
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs(f'echo > "{marker}"'), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(WeightsError):
        load_infdit(path)
    assert not marker.exists()


# --- writing

LAYOUT = {"a": ((2, 3), torch.float32), "b": ((), torch.bfloat16), "c": ((0, 4), torch.int64)}


def tensors_of(layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    return [torch.full(shape, 3, dtype=dtype) for shape, dtype in layout.values()]


def test_saved_as_others_read_it(tmp_path: Path) -> None:
    """Our writer is our own: safetensors' reader has to agree."""
    path = tmp_path / "new.safetensors"
    transposed = torch.arange(6.0).reshape(3, 2).T
    save_weights(path, LAYOUT, [transposed, *tensors_of(LAYOUT)[1:]], {"title": "ä ö \u5199"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"title": "ä ö \u5199"}
        for (name, (shape, dtype)), wanted in zip(LAYOUT.items(), [transposed, *tensors_of(LAYOUT)[1:]], strict=True):
            found = file.get_tensor(name)
            assert (tuple(found.shape), found.dtype) == (shape, dtype)
            assert torch.equal(found, wanted)


class Failed(Exception):
    pass


def breaking_off() -> Iterator[Tensor]:
    yield torch.zeros(2, 3)
    raise Failed


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (breaking_off, Failed),
        (lambda: tensors_of(LAYOUT)[:2], ValueError),
        (lambda: [*tensors_of(LAYOUT), torch.zeros(1)], ValueError),
        (lambda: [torch.zeros(3, 2), *tensors_of(LAYOUT)[1:]], ValueError),
        (lambda: [torch.zeros(2, 3).half(), *tensors_of(LAYOUT)[1:]], ValueError),
    ],
    ids=["breaks off", "too few", "too many", "shape", "dtype"],
)
@pytest.mark.parametrize("existing", [True, False])
def test_saving_is_all_or_nothing(
    tmp_path: Path, tensors: Callable[[], Any], error: type[Exception], existing: bool
) -> None:
    """A full disk or a killed run must not cost the weights that were there, nor leave rubbish beside them."""
    path = tmp_path / "weights.safetensors"
    if existing:
        path.write_bytes(b"the old weights")
    with pytest.raises(error):
        save_weights(path, LAYOUT, tensors(), {})
    assert [file.name for file in tmp_path.iterdir()] == (["weights.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"the old weights"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_saved_files_can_be_read_by_others(tmp_path: Path) -> None:
    """On a shared machine a trained network would be its owner's alone."""
    path, plain = tmp_path / "weights.safetensors", tmp_path / "plain"
    save_weights(path, LAYOUT, tensors_of(LAYOUT), {})
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
