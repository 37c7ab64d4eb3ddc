"""LoRA: nothing changes before training, only A and B train, and all ways to merge a file give one network."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infdit_core.cli import main
from infdit_core.infdit import InfDiT, load_infdit, save_infdit
from infdit_core.infdit.checkpoint import convert
from infdit_core.infdit.lora import add_lora, apply_lora, lora_tensors, merged_state, save_lora
from infdit_core.weights import WeightsError, open_weights

MakeModel = Callable[..., InfDiT]
CloseTo = Callable[..., None]

RANK, ALPHA = 2, 3.0
MODULES = 4 * 3 + 3  # of the small network: four a layer, three of the cross-attention


def picture(model: InfDiT) -> Tensor:
    """One evaluation, large enough that every layer and neighbour counts."""
    generator = torch.Generator().manual_seed(5)
    noisy, low_res = (torch.rand(1, 3, *size, generator=generator) * 2 - 1 for size in ((32, 32), (8, 8)))
    return model.denoise(noisy, 0.7, low_res)


def adapted(model: InfDiT, *, trained: bool = True) -> InfDiT:
    """A copy with a LoRA; trained: with B as after some training."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    add_lora(model, RANK, ALPHA, generator)
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.empty_like(parameter).normal_(std=0.05, generator=generator))
    return model


@pytest.fixture
def base(tiny_model: MakeModel) -> InfDiT:
    return tiny_model()


@pytest.fixture
def lora_file(base: InfDiT, tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    save_lora(path, adapted(base), {"title": "a test"})
    return path


# --- in training


def test_the_start_changes_nothing(base: InfDiT) -> None:
    """Fine-tuning that starts from another network than the one it was given."""
    assert torch.equal(picture(adapted(base, trained=False)), picture(base))


def test_only_updates_train(base: InfDiT) -> None:
    """A frozen weight that drifts is lost with the LoRA file; an update without a gradient never learns."""
    model = adapted(base.requires_grad_(True))
    picture(model).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * MODULES
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B"}


def test_what_is_adapted(base: InfDiT) -> None:
    """Every linear layer of attention and MLP has an update, nothing else."""
    names = {name.removesuffix(".lora_A.weight") for name in lora_tensors(adapted(base)) if "lora_A" in name}
    expected = {f"mixins.adaln_layer.cross_attention.{name}" for name in ("query", "key_value", "dense")}
    for i in range(3):
        parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        expected |= {f"transformer.layers.{i}.{part}" for part in parts}
    assert names == expected
    assert lora_tensors(base) == {}


def test_state_dict_round_trip(base: InfDiT, tmp_path: Path) -> None:
    """Training is interrupted and resumed through state dicts."""
    model, other = adapted(base), InfDiT(base.config)
    add_lora(other, RANK, ALPHA, torch.Generator().manual_seed(9))
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert torch.equal(picture(other), picture(model))


def test_a_copy_is_independent(base: InfDiT) -> None:
    """Training keeps an average of the network in a copy."""
    model = adapted(base)
    average, before = copy.deepcopy(model), picture(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(picture(average), before)


def test_same_generator_same_start(base: InfDiT) -> None:
    """Runs on other machines start from the same numbers, and the global random state is left alone."""
    state = torch.get_rng_state()
    one, two = (lora_tensors(adapted(base, trained=False)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_base_trains_in_float32(base: InfDiT) -> None:
    """Small steps would be rounded away in the precision that a frozen network can be kept in."""
    model = adapted(base.bfloat16())
    assert {t.dtype for t in lora_tensors(model).values()} == {torch.float32}
    assert {t.dtype for t in merged_state(model).values()} == {torch.bfloat16}
    assert picture(model).isfinite().all()


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_refused(base: InfDiT, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}: it must be at least 1"):
        add_lora(base, rank, ALPHA, torch.Generator())


def test_a_second_lora_is_refused(base: InfDiT, lora_file: Path) -> None:
    """It would be put on top of the first and be lost in the file; weights computed anew can't be changed."""
    model = adapted(base)
    for act in (lambda: add_lora(model, RANK, ALPHA, torch.Generator()), lambda: apply_lora(model, lora_file)):
        with pytest.raises(ValueError, match="has a LoRA already"):
            act()


# --- merging


def test_all_ways_lead_to_one_network(base: InfDiT, lora_file: Path, tmp_path: Path, assert_close: CloseTo) -> None:
    """The network in training, its merged file, and its LoRA file on the base, in memory and on disk."""
    model = adapted(base)
    expected = picture(model)
    assert (expected - picture(base)).abs().max() > 0.05, "a LoRA without effect shows nothing"

    save_infdit(tmp_path / "merged.safetensors", model, torch.float32)
    assert_close(picture(load_infdit(tmp_path / "merged.safetensors")), expected, 1e-5)

    save_infdit(tmp_path / "base.safetensors", base, torch.float32)
    loaded = load_infdit(tmp_path / "base.safetensors")
    apply_lora(loaded, lora_file)
    assert_close(picture(loaded), expected, 1e-5)

    arguments = ["convert", tmp_path / "base.safetensors", tmp_path / "out.safetensors", "--lora", lora_file]
    assert main([str(argument) for argument in arguments]) == 0
    assert_close(picture(load_infdit(tmp_path / "out.safetensors")), expected, 1e-5)
    merged = open_weights(tmp_path / "out.safetensors").metadata["merged_lora"]
    assert merged == "style.safetensors, rank 2, alpha 3"


def test_merged_state(base: InfDiT, assert_close: CloseTo) -> None:
    """Plain names, the update in them, and the network trains on as it was."""
    model = adapted(base)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plain = InfDiT(base.config)
    plain.load_state_dict(merged_state(model))  # strict: every plain name, no other
    assert_close(picture(plain), picture(model), 1e-5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    unchanged = merged_state(base)
    assert unchanged.keys() == base.state_dict().keys()
    assert all(torch.equal(t, unchanged[name]) for name, t in base.state_dict().items())


def test_merging_is_rounded_once(base: InfDiT, lora_file: Path, tmp_path: Path) -> None:
    """A small update rounded before it is added, or added in bfloat16, is lost to a good part."""
    save_infdit(tmp_path / "base.safetensors", base)
    convert(tmp_path / "base.safetensors", tmp_path / "out.safetensors", lora=lora_file)
    tensors, update = load_file(tmp_path / "base.safetensors"), load_file(lora_file)
    name = "transformer.layers.1.mlp.dense_4h_to_h"
    product = update[f"{name}.lora_B.weight"] @ update[f"{name}.lora_A.weight"]
    expected = (tensors[f"{name}.weight"].float() + ALPHA / RANK * product).bfloat16()
    assert torch.equal(load_file(tmp_path / "out.safetensors")[f"{name}.weight"], expected)


def test_strength_scales(base: InfDiT, lora_file: Path, assert_close: CloseTo) -> None:
    """The update goes from none over half to all of it, and back."""
    full = {name: t - base.state_dict()[name] for name, t in merged_state(adapted(base)).items()}
    for strength in (0.0, 0.5, 1.0, -1.0):
        model = copy.deepcopy(base)
        apply_lora(model, lora_file, strength)
        for name, t in model.state_dict().items():
            assert_close(t - base.state_dict()[name], strength * full[name], 1e-6)


# --- files


def test_lora_file(base: InfDiT, lora_file: Path, tmp_path: Path) -> None:
    """A file of its own: the updates under the published names, no weight of the network."""
    with safe_open(lora_file, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {"architecture": "infdit_lora", "rank": "2", "alpha": "3.0", "title": "a test"}
    tensors = load_file(lora_file)
    assert len(tensors) == 2 * MODULES
    assert tensors["transformer.layers.0.mlp.dense_4h_to_h.lora_A.weight"].shape == (RANK, 64)
    assert tensors["transformer.layers.0.mlp.dense_4h_to_h.lora_B.weight"].shape == (16, RANK)
    for name, t in lora_tensors(adapted(base)).items():
        assert torch.equal(tensors[name], t)
    save_lora(tmp_path / "half.safetensors", adapted(base), dtype=torch.bfloat16)
    assert set(open_weights(tmp_path / "half.safetensors").dtypes.values()) == {torch.bfloat16}
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_lora(tmp_path / "none.safetensors", base)


def test_info(lora_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(lora_file)]) == 0
    said = capsys.readouterr().out.splitlines()
    for line in ("kind: LoRA for Inf-DiT, safetensors", "rank: 2", "alpha: 3", "adapts: 15 modules"):
        assert line in said
    assert "says title: a test" in said


def refused(base: InfDiT, path: Path, *said: str) -> None:
    """apply_lora names the file and says all this, and leaves the network alone."""
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(WeightsError, match=re.escape(str(path))) as refusal:
        apply_lora(base, path)
    for part in said:
        assert part in str(refusal.value)
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())


def test_files_of_another_kind(base: InfDiT, tmp_path: Path) -> None:
    """A network, or a LoRA for another one, chosen from a list."""
    network, foreign = tmp_path / "network.safetensors", tmp_path / "foreign.safetensors"
    save_infdit(network, base)
    refused(base, network, "not a LoRA for Inf-DiT", "architecture infdit instead")
    save_file({"unet.up.lora_A.weight": torch.zeros(2, 2), "unet.up.lora_B.weight": torch.zeros(2, 2)}, foreign)
    refused(base, foreign, "not a LoRA for Inf-DiT", "unet.up.lora_A.weight", "architecture unknown")


def test_a_lora_is_no_network(lora_file: Path) -> None:
    """As above, the other way round."""
    with pytest.raises(WeightsError, match=r"is a LoRA for Inf-DiT, no network.*--lora"):
        load_infdit(lora_file)


def test_another_network(tiny_model: MakeModel, lora_file: Path, tmp_path: Path) -> None:
    """The right kind of LoRA for a network of another size."""
    refused(tiny_model(num_layers=1), lora_file, "transformer.layers.1.attention", "doesn't have", "8 of 15")
    refused(tiny_model(hidden_size=32), lora_file, "(16, 16)", "(32, 32)", "15 of 15", "trained on")

    save_infdit(tmp_path / "shallow.safetensors", tiny_model(num_layers=1))
    with pytest.raises(WeightsError, match="doesn't fit this network"):
        convert(tmp_path / "shallow.safetensors", tmp_path / "out.safetensors", lora=lora_file)
    assert not (tmp_path / "out.safetensors").exists()


NAME = "transformer.layers.1.attention.dense.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({NAME: None}, {}, "transformer.layers.1.attention.dense"),
        ({NAME: torch.zeros(16, 5)}, {}, "(16, 5)"),
        ({NAME: torch.zeros(16)}, {}, "(16,)"),
        ({NAME: torch.zeros(15, RANK)}, {}, "(15, 16)"),
        ({"extra": torch.zeros(1)}, {}, "extra"),
        ({}, {"rank": "3"}, "rank 3"),
        ({}, {"rank": "0"}, "rank 0"),
        ({}, {"rank": "two"}, "two"),
        ({}, {"alpha": "nan"}, "nan"),
        ({}, {"alpha": None}, "alpha"),
    ],
)
def test_broken_files(
    base: InfDiT,
    lora_file: Path,
    tmp_path: Path,
    tensors: dict[str, Tensor | None],
    metadata: dict[str, str | None],
    said: str,
) -> None:
    """Files with something missing, foreign or of another shape."""
    path = tmp_path / "broken.safetensors"
    content = load_file(lora_file) | tensors
    says = dict(open_weights(lora_file).metadata) | metadata
    kept = {name: t for name, t in content.items() if t is not None}
    save_file(kept, path, metadata={key: value for key, value in says.items() if value is not None})
    refused(base, path, said)


def test_command_line_refuses(
    base: InfDiT, lora_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The LoRA file is an input: it is never written over, even where that is allowed for others."""
    network, before = tmp_path / "network.safetensors", lora_file.read_bytes()
    save_infdit(network, base)
    for target, lora, said in [
        (lora_file, lora_file, "choose another name"),
        (tmp_path / "out.safetensors", network, "not a LoRA for Inf-DiT"),
        (tmp_path / "out.safetensors", tmp_path / "none.safetensors", "doesn't exist"),
    ]:
        assert main(["convert", str(network), str(target), "--lora", str(lora), "--overwrite"]) == 1
        assert said in capsys.readouterr().err
    assert lora_file.read_bytes() == before and not (tmp_path / "out.safetensors").exists()


def test_a_hosts_layers(base: InfDiT, tmp_path: Path, assert_close: CloseTo) -> None:
    """A host brings subclasses of torch's layers: they are adapted as well."""

    class Operations:
        class Linear(nn.Linear):
            pass

        Conv2d, LayerNorm = nn.Conv2d, nn.LayerNorm

    save_infdit(tmp_path / "base.safetensors", base, torch.float32)
    model = adapted(load_infdit(tmp_path / "base.safetensors", operations=Operations))
    assert_close(picture(model), picture(adapted(base)), 1e-6)
