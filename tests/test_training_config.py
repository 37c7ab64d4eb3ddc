"""Settings of a training run: what is given is what is trained, and what makes no sense is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from infdit_core.infdit import InfDiTConfig, load_infdit, save_infdit
from infdit_core.infdit.config import Preset
from infdit_core.training import loop
from infdit_core.training.config import DataConfig, TrainConfig, differences, parse, save

NEEDED = ["data.train=[photographs]", "out=run"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- merging


def test_files_merge_in_order_and_arguments_win(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "batch: 3\nsteps: 30\ndata: {crop: 64, held: 2}\n")
    second = write(tmp_path / "second.yaml", "steps: 40\ndata: {crop: 96}\n")
    config = parse([*NEEDED, "steps=50", first, second])
    assert (config.batch, config.steps, config.data.crop, config.data.held) == (3, 50, 96, 2)
    assert parse([*NEEDED, first, second]).steps == 40
    assert parse([*NEEDED, second, first]).data.crop == 64
    (tmp_path / "rate=0.1").mkdir()
    assert parse([*NEEDED, write(tmp_path / "rate=0.1" / "config.yaml", "batch: 5\n")]).batch == 5


def test_a_later_argument_wins() -> None:
    assert parse([*NEEDED, "batch=3", "batch=4"]).batch == 4


def test_values_have_their_types() -> None:
    config = parse(
        [*NEEDED, "optimizer.betas=[0.8, 0.9]", "optimizer.learning_rate=2e-3", "compile=true", "data.cache=2"]
    )
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.learning_rate == 2e-3
    assert config.compile is True
    assert isinstance(config.data.cache, float)
    assert isinstance(config.network, InfDiTConfig)


def test_nothing_given_is_the_published_recipe() -> None:
    config = parse(NEEDED)
    assert config == TrainConfig(out="run", data=DataConfig(train=["photographs"]))
    data, loss, optimizer = config.data, config.loss, config.optimizer
    assert config.network == InfDiTConfig()
    assert (data.crop, data.direct, data.mirror, data.degraded) == (512, 0.7, 0.3, 1.0)
    assert (data.turn, data.candidates, data.surrounded) == (False, 1, 0.0)
    assert (loss.sigma_log_mean, loss.sigma_log_deviation, loss.weight, loss.power) == (-1.0, 1.4, "edm", 2)
    assert (loss.lr_dropout, loss.regression, loss.direction) == (0.07, 0.0, "lt")
    assert (optimizer.kind, optimizer.learning_rate, optimizer.clip) == ("adamw", 1e-4, 0.1)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 1e-4)
    assert optimizer.ema < 1
    assert config.precision == "bfloat16"


def test_infdit_is_the_published_recipe_sharded() -> None:
    changed = differences(parse(NEEDED), parse(["infdit", *NEEDED]))
    assert changed.keys() == {"strategy", "compile", "checkpointing"}
    assert parse(["infdit", *NEEDED]).strategy == "fsdp"


def test_nano_trains_the_default_weights_further() -> None:
    config = parse(["nano", *NEEDED, "start_from=default"])
    network = loop._network(config)
    assert config.network is not None
    assert network.config == load_infdit().config
    assert network.config.presets["balanced"] == Preset(1, detail=0.7)
    assert 0 < config.data.degraded < 1
    assert config.loss.regression > 0


def test_nano_can_do_without_a_predictor(tmp_path: Path) -> None:
    arguments = ["nano", *NEEDED, "network.predictor_width=0", "network.predictor_depth=0"]
    network = loop._network(parse(arguments))
    assert network.predictor is None
    save_infdit(tmp_path / "weights.safetensors", network)
    network = loop._network(parse([*arguments, f"start_from={tmp_path / 'weights.safetensors'}"]))
    assert network.predictor is None


def test_saved_settings_are_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for arguments in (
        [],
        ["nano", "seed=7", "optimizer.betas=[0.5,0.75]", "presets=[detailed]", "data.test=[a b, 'c=d']"],
        ["infdit", "network=null", "start_from=weights.safetensors", "strategy=auto", "lora.rank=4"],
    ):
        config = parse([*NEEDED, *arguments])
        save(config, path)
        assert parse([str(path)]) == config


def test_differences_name_what_changed() -> None:
    before = parse(NEEDED)
    now = replace(before, batch=16, data=replace(before.data, crop=256))
    assert differences(before, now) == {"batch": (8, 16), "data.crop": (512, 256)}
    assert differences(before, before) == {}


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stepz=3"], "stepz"),
        (["data.cropp=3"], r"data\.cropp"),
        (["steps=three"], "steps"),
        (["steps=1.5"], "steps"),
        (["steps="], "steps"),
        (["compile=perhaps"], "compile"),
        (["loss.direction=tl"], r"loss\.direction"),
        (["optimizer.betas=[0.9]"], r"optimizer\.betas"),
        (["optimizer.betas=[0.9,2]"], r"optimizer\.betas"),
        (["data=3"], "data=3"),
        (["data.train=photographs"], r"data\.train.* list"),
        (["steps=[1"], "steps"),
        (["=3"], "=3"),
        (["batch=${nothing}"], "nothing.*batch"),
        (["steps=0"], "steps=0"),
        (["batch=-1"], "batch=-1"),
        (["accumulate=0"], "accumulate=0"),
        (["keep=0"], "keep=0"),
        (["data.crop=0"], r"data\.crop=0"),
        (["data.held=0"], r"data\.held=0"),
        (["data.workers=-1"], r"data\.workers=-1"),
        (["data.cache=-1"], r"data\.cache=-1"),
        (["data.direct=1.5"], r"data\.direct=1\.5"),
        (["data.degraded=-0.1"], r"data\.degraded=-0\.1"),
        (["loss.lr_dropout=2"], r"loss\.lr_dropout=2"),
        (["data.mild=1.5"], r"data\.mild=1\.5"),
        (["loss.regression=0.5", "loss.own_input=0.75"], r"loss\.own_input=1\.25"),
        (["loss.power=3"], r"loss\.power=3"),
        (["loss.sigma_log_deviation=-1"], r"loss\.sigma_log_deviation=-1"),
        (["optimizer.learning_rate=0"], r"optimizer\.learning_rate=0"),
        (["optimizer.learning_rate=nan"], r"optimizer\.learning_rate=nan"),
        (["optimizer.clip=0"], r"optimizer\.clip=0"),
        (["optimizer.ema=1.1"], r"optimizer\.ema=1\.1"),
        (["seed=-1"], "seed=-1"),
        (["pictures=-1"], "pictures=-1"),
        (["lora.rank=-1", "start_from=default"], r"lora\.rank=-1"),
        (["lora.rank=4"], r"start_from"),
        (["lora.rank=4", "start_from=default", "strategy=fsdp"], "strategy=auto"),
        (["optimizer.kind=muon", "strategy=fsdp"], r"optimizer\.kind=adamw"),
        (["network=null"], "start_from"),
        (["network.hidden_size=30"], "hidden size 30"),
        (["network.presets={fast: {steps: 0}}"], "preset fast: steps is 0"),
        (["network.presets={fast: {start: 0.1}}"], r"network\.presets\.fast\.steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse([*NEEDED, *arguments])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"data: [1, 2\n", "flow sequence"),
        (b"data:\n\tcrop: 3\n", "token"),
        (b"- a\n- b\n", "incompatible"),
        (b"hello\n", "hello"),
        (b"out: \xff\xfe\n", "codec"),
        (b"data: {cropp: 3}\n", r"data\.cropp"),
        (b"batch: many\n", "batch"),
        (b"batch: 1\nbatch: 2\n", "mapping"),
    ],
)
def test_unfit_files_are_refused_by_name(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{said}"):
        parse([*NEEDED, str(path)])


def test_an_unknown_config_is_told_the_known_ones(tmp_path: Path) -> None:
    for name in ("nono", str(tmp_path / "missing.yaml"), str(tmp_path)):
        with pytest.raises(ValueError, match="is no config: give infdit, nano"):
            parse([*NEEDED, name])


def test_folders_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^say out=FOLDER and data\.train=\[FOLDER\]$"):
        parse(["nano"])
    with pytest.raises(ValueError, match=r"^say out=FOLDER$"):
        parse([NEEDED[0]])
