"""The network, sampling and training agree with the published code, number by number.

The reference ran with random weights on the CPU in fp32; where its own rounding reaches 1e-5 the tolerance is wider.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infdit_core import semantics
from infdit_core.diffusion import edm, preconditioning, samplers
from infdit_core.images import Picture, read_picture, resize, write_picture
from infdit_core.infdit import InfDiT, InfDiTConfig, load_infdit
from infdit_core.infdit import model as model_module
from infdit_core.infdit.attention import Border, rotary_table, rotate
from infdit_core.infdit.streaming import KVCache, LowResolutionLines, Scan, Tile
from infdit_core.training import losses

NETWORK = 1e-5
SAMPLER = 1e-4
ILL_CONDITIONED = 5e-3  # two Heun steps from 40 to 0.002: the reference itself is 2e-3 from its fp64 run

Golden = dict[str, Tensor]
GoldenFile = Callable[[str], Golden]
CloseTo = Callable[..., None]
Denoise = Callable[[Tensor, Tensor], Tensor]


def to_blocks(x: Tensor, rows: int, cols: int) -> Tensor:
    """Tokens in raster order over the picture (B, tokens, C) -> (B, rows, cols, N, C)."""
    side = int((x.shape[1] / (rows * cols)) ** 0.5)
    return rearrange(x, "b (r p s q) c -> b r s (p q) c", r=rows, s=cols, p=side, q=side)


def to_raster(x: Tensor) -> Tensor:
    side = int(x.shape[3] ** 0.5)
    return rearrange(x, "b r s (p q) c -> b (r p s q) c", p=side, q=side)


def lr_lines(model: InfDiT, scan: Scan, low_res: Tensor) -> LowResolutionLines:
    return LowResolutionLines(scan, low_res, model.config, model.lr_embed, model.layers[0].cross.keys_values)


def whole(rows: int, cols: int, direction: str = "lt") -> tuple[Scan, Tile]:
    scan = Scan(rows, cols, (rows, cols), direction)  # type: ignore[arg-type]
    return scan, scan.tiles[0]


def record(module: nn.Module) -> list[Tensor]:
    """The list that every output of a module goes to from now on."""
    outputs: list[Tensor] = []
    module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    return outputs


# --- the file


def test_hyper_parameters_are_read_off_the_file(golden_model: InfDiT, golden_folder: Path) -> None:
    """Wrong hyper-parameters make a network that loads and answers noise."""
    said = json.loads((golden_folder / "config.json").read_text())
    shape = said["architecture"]
    config = golden_model.config
    assert config == InfDiTConfig(
        hidden_size=shape["hidden_size"],
        num_layers=shape["num_layers"],
        num_heads=shape["num_attention_heads"],
        patch_size=shape["patch_size"],
        block_size=shape["image_block_size"],
        scale=shape["sr_scale"],
        semantic_size=shape["vector_dim"],
        time_channels=said["time_embed_channels"],
        rope_side=said["rope_table_side"],
        sigma_data=said["loss"]["sigma_data"],
        sigma_min=said["sampler"]["sigma_min"],
        sigma_max=said["sampler"]["sigma_max"],
    )
    assert (config.head_size, config.block_tokens) == (said["head_dim"], said["block_tokens"])
    assert config.lr_block_tokens * said["lr_patch_size"] == said["lr_block_size"] * 2


# --- embeddings


def test_preconditioning(golden: GoldenFile, assert_close: CloseTo) -> None:
    """Wrong coefficients leave noise in the picture or wash it out."""
    a = golden("a_embeddings")
    coefficients = preconditioning.edm(a["sigmas"], 0.5)
    for name, found in zip(("c_skip", "c_out", "c_in", "c_noise"), coefficients, strict=True):
        assert_close(found, a[name], 1e-6)


def test_time_and_semantic_embedding(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """The network would be told another noise level, or another subject, than it works at."""
    a = golden("a_embeddings")
    model = copy.deepcopy(golden_model)
    features: list[Tensor] = []
    model.time_in.register_forward_pre_hook(lambda _module, args: features.append(args[0]))
    time, semantic = record(model.time_out), record(model.semantic_out)
    embedding = model.conditioning(a["c_noise"], a["vector"])
    assert_close(features[0], a["time_features"], NETWORK)
    assert_close(time[0], a["time_embed"], NETWORK)
    assert_close(time[0] + semantic[0], a["cond_embed"], NETWORK)
    assert_close(embedding, a["emb"], NETWORK)


def test_no_semantic_vector_adds_nothing(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Pictures upscaled without CLIP would be steered by a vector that means nothing."""
    a = golden("a_embeddings")
    found = golden_model.conditioning(a["c_noise"], None)
    assert_close(found, F.silu(a["cond_embed_without_vector"]), NETWORK)


def test_modulations(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Shift and scale swapped, or SiLU forgotten: output that is off everywhere."""
    a = golden("a_embeddings")
    modulations = golden_model.modulations(a["emb"])
    assert len(modulations) == golden_model.config.num_layers + 1
    assert_close(torch.cat(modulations[0], dim=-1).squeeze(), a["adaln0"], NETWORK)
    assert_close(torch.cat(modulations[-1], dim=-1).squeeze(), a["final_adaln"], NETWORK)


# --- low-resolution features and cross-attention


def test_low_resolution_features(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """A block that looks at the wrong part of the low resolution draws what isn't there."""
    b = golden("b_cross_lr")
    assert_close(golden_model.lr_embed(b["feat.lr_imgs"]), b["feat.proj_lr"], NETWORK)

    scan, tile = whole(3, 3)
    lines = LowResolutionLines(
        scan,
        b["feat.lr_imgs"],
        golden_model.config,
        golden_model.lr_embed,
        lambda features: features.expand(2, -1, -1, -1, -1),
    )
    around = lines.around(tile)[0, 0]  # (5 m, 5 m, C)
    m = golden_model.config.lr_block_tokens
    windows = [around[i * m : (i + 3) * m, j * m : (j + 3) * m].flatten(0, 1) for i in range(3) for j in range(3)]
    assert_close(torch.stack(windows)[b["feat.block_ids"]], b["feat.features"], NETWORK)


def test_cross_attention(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """The low resolution is all that holds the result to the input."""
    b = golden("b_cross_lr")
    assert b["cross.hw"].tolist() == [8, 16]
    scan, tile = whole(1, 2)
    found = golden_model.layers[0].cross(
        to_blocks(b["cross.hidden"], 1, 2),
        lr_lines(golden_model, scan, b["cross.lr_imgs"]).around(tile),
        golden_model.lr_query_position,
        golden_model.lr_key_position,
    )
    assert_close(to_raster(found), b["cross.out"], NETWORK)


# --- one layer


def layer_alone(model: InfDiT, index: int) -> InfDiT:
    part = copy.deepcopy(model)
    part.layers = part.layers[index : index + 1]
    part.neighbour_position = nn.Parameter(part.neighbour_position[index : index + 1])
    return part


def run_layer(model: InfDiT, c: Golden, index: int, direction: str) -> tuple[Tensor, Tensor]:
    """A layer's output and that of its self-attention, both (B, tokens, C) in raster order."""
    part = layer_alone(model, index)
    attended = record(part.layers[0].attention_out)
    rows, cols = (int(tokens) // model.config.block_tokens for tokens in c["hw"])
    scan, tile = whole(rows, cols, direction)
    height, width = (torch.arange(int(tokens)) for tokens in c["hw"])
    positions = torch.stack(torch.meshgrid(height, width, indexing="ij"), dim=-1).flatten(0, 1)
    assert torch.equal(positions[None], c["rope_position_ids"])
    x = part.run_tile(
        scan.arrange(to_blocks(c["hidden"], rows, cols)),
        model.modulations(c["emb"])[index : index + 1],
        lr_lines(model, scan, c["lr_imgs"]).around(tile),
        scan.arrange(rotary_table(height, width, model.config.block_tokens, model.config.head_size), dim=0),
        scan,
        KVCache(scan, 1, None),
        tile,
    )
    return to_raster(scan.restore(x)), to_raster(scan.restore(attended[0]))


@pytest.mark.parametrize("direction", ["lt", "rb"])
@pytest.mark.parametrize("index", [0, 1])
def test_layer(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo, index: int, direction: str) -> None:
    """One wrong norm, order of keys or residual, and every picture is wrong."""
    c = golden("c_layers")
    found, _ = run_layer(golden_model, c, index, direction)
    assert_close(found, c[f"layer{index}_{direction}"], NETWORK)


def test_self_attention(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Tells a fault of the block attention from one of the rest of a layer."""
    c = golden("c_layers")
    _, attended = run_layer(golden_model, c, 0, "lt")
    assert_close(attended, c["layer0_lt_attn_out"], NETWORK)


# --- whole pictures

LAYOUTS = ["1x1", "1x4", "2x3", "3x3", "4x1"]


def first_picture(d: Golden) -> dict[str, Tensor]:
    return {
        "noisy": d["b1.images"],
        "low_res": d["b1.lr_imgs"],
        "upsampled": d["b1.concat_lr_imgs"],
        "semantic": d["b1.vector"],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_denoise(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo, layout: str) -> None:
    """The published weights would give other pictures than the published code."""
    d = golden(f"d_full_{layout}")
    for i, sigma in enumerate(d["b1.sigmas"]):
        assert_close(golden_model.denoise(sigma=sigma, **first_picture(d)), d[f"b1.out{i}"], NETWORK)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_denoise_a_batch(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo, layout: str) -> None:
    """Pictures of a batch, each with its own sigma and vector, would mix."""
    d = golden(f"d_full_{layout}")
    noisy, low_res, upsampled = (
        torch.cat([d[f"b1.{name}"], d[f"b2.{name}.item1"]]) for name in ("images", "lr_imgs", "concat_lr_imgs")
    )
    found = golden_model.denoise(noisy, d["b2.sigmas"], low_res, upsampled=upsampled, semantic=d["b2.vector"])
    assert_close(found, d["b2.out"], NETWORK)


def test_denoise_to_the_right_and_below(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Direction rb has an order of neighbours of its own; the mirror image of lt is wrong by 0.38."""
    d, expected = golden("d_full_2x3"), golden("d_rb_2x3")
    for i, sigma in enumerate(d["b1.sigmas"]):
        found = golden_model.denoise(sigma=sigma, direction="rb", **first_picture(d))
        assert_close(found, expected[f"b1.out{i}"], NETWORK)


@pytest.mark.parametrize("tile", [None, (1, 1), (2, 2), (3, 1)])
def test_streamed_result_is_the_published_whole_one(
    golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo, tile: tuple[int, int] | None
) -> None:
    """The published code's own tiled mode is wrong in every block; ours has to give its whole-image result."""
    e = golden("e_ar")
    found = golden_model.denoise(
        e["4x2.images"],
        e["4x2.sigmas"],
        e["4x2.lr_imgs"],
        upsampled=e["4x2.concat_lr_imgs"],
        semantic=e["4x2.vector"],
        tile=tile,
    )
    assert_close(found, e["4x2.full"], NETWORK)


# --- sampling


@pytest.mark.parametrize("n", [1, 2, 5, 18, 20])
def test_sigmas(golden: GoldenFile, n: int) -> None:
    """A sampler on other noise levels gives other pictures."""
    torch.testing.assert_close(edm.sigmas(n), golden("f_sigmas")[f"n{n}"], rtol=1e-6, atol=0)


def test_sigmas_from_elsewhere(golden: GoldenFile) -> None:
    """sigma_max, which presets and hosts set, would be ignored."""
    torch.testing.assert_close(edm.sigmas(5, sigma_max=80.0), golden("f_sigmas")["n5_sigma_max_80"], rtol=1e-6, atol=0)


class Case:
    """A sampling run of the reference: its inputs, and the network as samplers want it."""

    def __init__(self, model: InfDiT, g: Golden, pictures: str, name: str) -> None:
        self.model = model
        self.pictures = {key: g[f"{pictures}.{key}"] for key in ("concat_lr_imgs", "lr_imgs", "vector")}
        self.expected = {
            key.removeprefix(f"{pictures}.{name}."): t for key, t in g.items() if key.startswith(f"{pictures}.{name}.")
        }
        self.sigmas_seen: list[Tensor] = []
        self.drawn = 1  # the first noise is in the start

    def start(self, sigmas: Tensor, from_upsampled: bool) -> Tensor:
        start = sigmas[0] * self.expected["randn0"]
        return start + self.pictures["concat_lr_imgs"] if from_upsampled else start

    def evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.model.denoise(
            x,
            sigma,
            self.pictures["lr_imgs"],
            upsampled=self.pictures["concat_lr_imgs"],
            semantic=self.pictures["vector"],
        )

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.sigmas_seen.append(sigma)
        return self.evaluate(x, sigma)

    def noise(self, x: Tensor) -> Tensor:
        self.drawn += 1
        return self.expected[f"randn{self.drawn - 1}"]

    def check(self, found: Tensor, tolerance: float, assert_close: CloseTo) -> None:
        assert_close(found, self.expected["out"], tolerance)
        torch.testing.assert_close(torch.stack(self.sigmas_seen), self.expected["nfe_sigmas"], rtol=1e-6, atol=0)


def all_drawn(case: Case) -> bool:
    return case.drawn == sum(key.startswith("randn") for key in case.expected)


@pytest.mark.parametrize("from_upsampled", [True, False])
def test_heun(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo, from_upsampled: bool) -> None:
    """The paper's sampler, from the upsampled picture plus noise, and from noise alone."""
    g = golden("g_samplers")
    case = Case(golden_model, g, "heun_2x3", f"init_noise_{str(from_upsampled).lower()}")
    case.expected["randn0"] = g["heun_2x3.init_noise_true.randn0"]  # both runs used it
    sigmas = edm.sigmas(5)
    case.check(samplers.heun(case.denoise, case.start(sigmas, from_upsampled), sigmas), SAMPLER, assert_close)


def test_heun_step_by_step(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Says which step of a sampler went wrong; and previews show what callbacks get."""
    case = Case(golden_model, golden("g_samplers"), "small_1x2", "heun")
    sigmas = edm.sigmas(5)
    reports: list[dict[str, Tensor]] = []
    found = samplers.heun(case.denoise, case.start(sigmas, True), sigmas, callback=reports.append)
    case.check(found, SAMPLER, assert_close)
    assert_close(reports[0]["denoised"], case.expected["first_denoised"], SAMPLER)
    for i in range(4):
        assert_close(reports[i + 1]["x"], case.expected[f"x_after_step{i}"], SAMPLER)


def test_heun_in_one_step(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """steps = 1, the fastest setting."""
    case = Case(golden_model, golden("g_samplers"), "small_1x2", "heun_n1")
    sigmas = edm.sigmas(1)
    case.check(samplers.heun(case.denoise, case.start(sigmas, True), sigmas), SAMPLER, assert_close)


def test_heun_in_two_steps(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """The correction of the first step and the Euler step at the end, each alone."""
    case = Case(golden_model, golden("g_samplers"), "small_1x2", "heun_n2_init_noise_false")
    sigmas = edm.sigmas(2)
    case.check(samplers.heun(case.denoise, case.start(sigmas, False), sigmas), ILL_CONDITIONED, assert_close)


def test_heun_with_churn(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """The stochastic sampler: how much noise is added, where, and at which sigma the network is asked."""
    case = Case(golden_model, golden("g_samplers"), "small_1x2", "heun_churn")
    sigmas = edm.sigmas(5)
    found = samplers.heun(
        case.denoise,
        case.start(sigmas, True),
        sigmas,
        s_churn=1.5,
        s_noise=1.003,
        s_tmin=0.05,
        s_tmax=20,
        noise=case.noise,
    )
    case.check(found, SAMPLER, assert_close)
    assert all_drawn(case)


@pytest.mark.parametrize(
    ("name", "steps", "share", "from_upsampled"),
    [("ddim_s01", 5, 0.1, True), ("ddim_s0", 5, 0.0, True), ("ddim_s01_init_noise_false", 2, 0.1, False)],
)
def test_ddim(
    golden: GoldenFile,
    golden_model: InfDiT,
    assert_close: CloseTo,
    name: str,
    steps: int,
    share: float,
    from_upsampled: bool,
) -> None:
    """The published DDIM variant: the noise it draws, in its order."""
    case = Case(golden_model, golden("g_samplers"), "small_1x2", name)
    sigmas = edm.sigmas(steps)
    noise = torch.zeros_like if share == 0 else case.noise
    found = samplers.ddim(case.denoise, case.start(sigmas, from_upsampled), sigmas, s_noise=share, noise=noise)
    case.check(found, SAMPLER, assert_close)
    assert all_drawn(case)


def attention_within_blocks(q: Tensor, kv: Tensor, positions: Tensor, border: Border, top_first: bool) -> Tensor:
    """What the reference calls do_concat=False: every block sees itself alone, without a position embedding."""
    key, value = kv.unbind(0)
    query, key, value = (t.flatten(0, 2).transpose(1, 2) for t in (q, key, value))
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).unflatten(0, q.shape[:3]).flatten(-2)


def within_blocks(denoise: Denoise) -> Denoise:
    def run(x: Tensor, sigma: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_module, "block_attention", attention_within_blocks)
            return denoise(x, sigma)

    return run


def test_blocks_on_their_own(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Tells a fault in the exchange between blocks from one inside them."""
    case = Case(golden_model, golden("g_samplers"), "small_1x2", "heun_no_concat_n2")
    sigmas = edm.sigmas(2)
    found = samplers.heun(within_blocks(case.denoise), case.start(sigmas, True), sigmas)
    case.check(found, ILL_CONDITIONED, assert_close)


def test_guidance_by_blocks_on_their_own(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Two evaluations a sigma that are combined: a sampler has to leave that to `denoise`."""
    case = Case(golden_model, golden("g_samplers"), "small_1x2", "heun_cfg15_n2")

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        apart, together = within_blocks(case.evaluate)(x, sigma), case.denoise(x, sigma)
        return apart + 1.5 * (together - apart)

    sigmas = edm.sigmas(2)
    case.check(samplers.heun(guided, case.start(sigmas, True), sigmas), ILL_CONDITIONED, assert_close)


@pytest.mark.parametrize("tile", [None, (1, 1)])
def test_positions_wrap(
    golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo, tile: tuple[int, int] | None
) -> None:
    """A picture wider than the table of positions, as the published code does it."""
    g = {name.removeprefix("wrap_1x17."): t for name, t in golden("g_samplers").items() if name.startswith("wrap")}
    upsampled = g["lr_imgs"].repeat_interleave(4, 2).repeat_interleave(4, 3)
    sigmas = edm.sigmas(1)
    x = upsampled + sigmas[0] * g["noise_tile.randn0"].repeat(1, 1, 1, 17)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return golden_model.denoise(
            x, sigma, g["lr_imgs"], upsampled=upsampled, semantic=g["vector"], tile=tile, positions="reference"
        )

    columns = samplers.heun(denoise, x, sigmas).unflatten(3, (17, -1))
    assert_close(columns[:, :, :, g["kept_block_columns"]].flatten(3), g["out_kept"], SAMPLER)

    rotation = golden_model._rotation(range(1), range(17), (0, 0), "reference")
    expected = rotary_table(torch.arange(8), g["rope_columns_of_first_row"], 8, golden_model.config.head_size)
    assert torch.equal(rotation, expected)


# --- training

LOSSES = [
    ("l2", "EDMWeighting", 2),
    ("l2", "UnitWeighting", 2),
    ("l2", "VWeighting", 2),
    ("l2", "EpsWeighting", 2),
    ("l1", "EDMWeighting", 1),
]
WEIGHTS = {
    "EDMWeighting": lambda sigma: edm.loss_weight(sigma, 0.5),
    "UnitWeighting": losses.unit_weight,
    "VWeighting": losses.v_weight,
    "EpsWeighting": losses.epsilon_weight,
}


def denoise_crops(model: InfDiT, h: Golden, prefix: str = "") -> Tensor:
    offset = (int(h[prefix + "rope_offset"][0]), int(h[prefix + "rope_offset"][1]))
    sigma = h[prefix + "sigmas"]
    noisy = h["sr_imgs"] + sigma[:, None, None, None] * h[prefix + "noise"]
    return model.denoise(noisy, sigma, h["lr_imgs"], upsampled=h["concat_lr_imgs"], semantic=h["vector"], offset=offset)


def test_denoise_with_shifted_positions(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Training at random positions is what lets the network work at any size."""
    h = golden("h_losses")
    assert_close(denoise_crops(golden_model, h), h["model_output"], NETWORK)


@pytest.mark.parametrize(("norm", "weighting", "power"), LOSSES)
def test_loss(golden: GoldenFile, assert_close: CloseTo, norm: str, weighting: str, power: int) -> None:
    """A training run at the paper's settings would learn at other noise levels than the paper's."""
    h = golden("h_losses")
    weight = WEIGHTS[weighting](h["sigmas"])
    torch.testing.assert_close(weight, h[f"weight.{weighting}"], rtol=1e-6, atol=0)
    loss = losses.denoising_loss(h["model_output"], h["sr_imgs"], weight, power)
    torch.testing.assert_close(loss, h[f"loss.{norm}.{weighting}"], rtol=1e-6, atol=0)
    if weighting == "EDMWeighting":
        torch.testing.assert_close(loss, h[f"get_loss.{norm}"], rtol=1e-6, atol=0)


def test_loss_of_a_published_training_step(golden: GoldenFile, golden_model: InfDiT) -> None:
    """Noise level, noise and offset as the published recipe draws them, network and loss together."""
    h = golden("h_losses")
    weight = edm.loss_weight(h["seeded.sigmas"], 0.5)
    loss = losses.denoising_loss(denoise_crops(golden_model, h, "seeded."), h["sr_imgs"], weight)
    torch.testing.assert_close(loss, h["seeded.loss"], rtol=1e-5, atol=0)


def test_gradients(golden: GoldenFile, golden_model: InfDiT, golden_folder: Path, assert_close: CloseTo) -> None:
    """Fine-tuning the published weights would go elsewhere than the published training."""
    from infdit_core.infdit.checkpoint import dropped_keys, key_table

    h = golden("h_losses")
    model = copy.deepcopy(golden_model).requires_grad_(True)
    weight = edm.loss_weight(h["sigmas"], 0.5)
    losses.denoising_loss(denoise_crops(model, h), h["sr_imgs"], weight).mean().backward()
    names = key_table(model.config.num_layers)
    gradients = {disk: model.get_parameter(code).grad for disk, code in names.items()}
    norms = json.loads((golden_folder / "gradient_norms.json").read_text())
    without = {name for name, norm in norms.items() if norm is None}
    assert without == norms.keys() - names.keys()
    assert without < dropped_keys(model.config.num_layers).keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        # Keys' bias in the cross-attention shifts all logits alike: its gradient is rounding noise.
        assert gradient.norm().item() == pytest.approx(norms[name], rel=1e-4, abs=1e-7), name
        if f"grad.{name}" in h:
            assert_close(gradient, h[f"grad.{name}"], NETWORK)
    assert sum(f"grad.{name}" in h for name in gradients) == sum(key.startswith("grad.") for key in h)


# --- rotary positions


def test_rotary_tables(golden: GoldenFile, golden_folder: Path, assert_close: CloseTo) -> None:
    """Tables aren't read from the file but computed: they must be those the weights were trained with."""
    i = golden("i_rope")
    table = rotary_table(torch.arange(128), torch.arange(128), 1, 16)[:, :, 0, 0]  # (128, 128, 8)
    cos, sin = (part.repeat_interleave(2, dim=-1) for part in (table.real, table.imag))
    assert_close(cos[::8, ::8], i["table_cos_sample"], 1e-6)
    assert_close(sin[::8, ::8], i["table_sin_sample"], 1e-6)
    assert_close(cos[:, 0, :8], i["table_cos_row"], 1e-6)
    assert_close(sin[0, :, 8:], i["table_sin_col"], 1e-6)
    weights = golden("weights")
    assert_close(cos, weights["mixins.adaln_layer.rope.freqs_cos"], 1e-6)
    assert_close(sin, weights["mixins.adaln_layer.rope.freqs_sin"], 1e-6)


def test_rotation_of_queries(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Which pairs of channels turn, by which axis and which way; and positions past the table wrap."""
    i = golden("i_rope")
    assert (i["raw_positions"] != i["wrapped_positions"]).any()
    for q, raw, wrapped, expected in zip(i["q"], i["raw_positions"], i["wrapped_positions"], i["out"], strict=True):
        table = rotary_table(wrapped[:, 0], wrapped[:, 1], 1, 16)
        each = torch.stack([table[k, k, 0] for k in range(len(q))])  # (14, 1, 8)
        assert_close(rotate(q, each), expected, NETWORK)
        for k, (row, col) in enumerate(raw.tolist()):
            shifted = golden_model._rotation(range(1), range(1), (row, col), "reference")
            assert_close(rotate(q[k], shifted[0, 0, 0]), expected[k], NETWORK)


# --- semantics


def test_text_steering(golden: GoldenFile, assert_close: CloseTo) -> None:
    """Prompts would push pictures another way, or too far."""
    j = golden("j_text_steering")
    assert_close(semantics.steer(j["image_raw"], j["pos_raw"], j["neg_raw"]), j["out"], 1e-6)
    assert_close(semantics.steer(j["image_raw"], j["pos_raw"], j["neg_raw"], 0.0), j["out_released"], 1e-6)


def test_clip_preprocessing(golden: GoldenFile, assert_close: CloseTo) -> None:
    """CLIP would describe another picture: clamped, shifted by a pixel, or in other colours."""
    k = golden("k_prepost")
    assert_close(semantics.preprocess(k["clip.in"], side=28), k["clip.out"], NETWORK)


# --- pictures in and out


def test_upsampled_low_resolution(golden: GoldenFile, assert_close: CloseTo) -> None:
    """The guide picture's kernel: bicubic without antialiasing is another one, off by 0.13."""
    k = golden("k_prepost")
    cropped = k["sr4.lr_imgs"]  # the reference cuts 11 x 18 down to 8 x 16; nothing is cut off here
    assert torch.equal(cropped, k["input"][:, :, 2:10, 1:17])
    for scale in (2, 4):
        found = resize(cropped, (8 * scale, 16 * scale))
        assert_close(found, k[f"sr{scale}.resized_unclipped"], NETWORK)
        assert_close(found.clamp(-1, 1), k[f"sr{scale}.concat_lr_imgs"], NETWORK)
    assert_close(resize(cropped, (4, 8)), k["sr2.lr_imgs"], NETWORK)


def test_missing_guide_picture_is_made(golden: GoldenFile, golden_model: InfDiT, assert_close: CloseTo) -> None:
    """Callers that leave `upsampled` out would get another result than the published code's."""
    k = golden("k_prepost")
    noisy = k["sr4.concat_lr_imgs"] + 0.1
    made, given = (
        golden_model.denoise(noisy, 0.5, k["sr4.lr_imgs"], upsampled=upsampled)
        for upsampled in (None, k["sr4.concat_lr_imgs"])
    )
    assert_close(made, given, NETWORK)


def test_written_pixels_are_rounded(golden: GoldenFile, tmp_path: Path) -> None:
    """The reference truncates, which darkens every picture by half a level; values beyond the range must not wrap."""
    k = golden("k_prepost")
    written, reference = k["post.in"], k["post.out"].squeeze(0).int()
    path = tmp_path / "pixels.png"
    write_picture(path, Picture(written[0].permute(1, 2, 0) / 2 + 0.5, 8, None, None))
    found = (read_picture(path).pixels * 255).round().int()
    exact = ((written[0].permute(1, 2, 0).double() + 1) / 2 * 255).clamp(0, 255)
    assert (found - exact).abs().max() <= 0.5 + 1e-4
    assert ((found - reference == 0) | (found - reference == 1)).all()


# --- bfloat16


def test_bfloat16_is_as_exact_as_the_reference(golden: GoldenFile, golden_folder: Path) -> None:
    """bfloat16 is what most people run: more error than the reference's own would show as grain."""
    bf16 = golden("l_bf16")
    model = load_infdit(golden_folder / "weights.safetensors", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = model.denoise(
        bf16["images"],
        bf16["sigmas"],
        bf16["lr_imgs"],
        upsampled=bf16["concat_lr_imgs"],
        semantic=bf16["vector"],
    )
    assert found.dtype == torch.float32
    ours, reference = ((t.float() - bf16["out_fp32"]).abs() for t in (found, bf16["out_bf16"]))
    assert ours.max() <= 1.03 * reference.max()
    assert ours.mean() <= 1.03 * reference.mean()
    assert ours.max() > 1e-4, "this was not computed in bfloat16"
