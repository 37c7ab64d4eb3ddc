"""Names of Inf-DiT's tensors on disk (those of the published file) and in the code."""

CLIP_PREFIX = "image_encoder.model."  # the CLIP image tower inside the published file

ADALN = "mixins.adaln_layer."
_TRANSFORMER = "transformer.layers.{}."

# Modules, each with a weight and a bias: on disk -> in the code.
_MODULES = {
    "mixins.patch_embed.proj": "patch_embed",
    ADALN + "proj_lr": "lr_embed",
    "time_embed.mlp.0": "time_in",
    "time_embed.mlp.2": "time_out",
    "cond_embed.map_vector.0": "semantic_in",
    "cond_embed.map_vector.2": "semantic_out",
    ADALN + "cross_attention.query": "layers.0.cross.query",
    ADALN + "cross_attention.key_value": "layers.0.cross.key_value",
    ADALN + "cross_attention.dense": "layers.0.cross.out",
    ADALN + "cross_q_ln": "layers.0.cross.query_norm",
    ADALN + "cross_k_ln": "layers.0.cross.key_norm",
    ADALN + "post_cross_attention_layernorm": "layers.0.post_cross_norm",
    "mixins.final_layer.adaLN_modulation.1": "final_modulation",
    "mixins.final_layer.linear": "final",
}
# The same for every layer {}.
_LAYER_MODULES = {
    ADALN + "adaLN_modulations.{}.1": "layers.{}.modulation",
    _TRANSFORMER + "attention.query_key_value": "layers.{}.qkv",
    ADALN + "q_layer_norm.{}": "layers.{}.qk_norm",
    _TRANSFORMER + "attention.dense": "layers.{}.attention_out",
    _TRANSFORMER + "mlp.dense_h_to_4h": "layers.{}.mlp_in",
    _TRANSFORMER + "mlp.dense_4h_to_h": "layers.{}.mlp_out",
}
# The predictor's and the detailer's, which the published file doesn't have, are called the same in both.
_PREDICTOR_ENDS = ("head", "tail")
_PREDICTOR_BLOCK = ("blocks.{}.conv_in", "blocks.{}.conv_out")
_PREDICTOR_CONDITION = tuple(f"condition.{i}" for i in range(3))
_PREDICTOR_MODULATION = "blocks.{}.modulation"
_PARAMETERS = {
    ADALN + "re_pos_embed": "neighbour_position",
    ADALN + "lr_query_position_embedding": "lr_query_position",
    ADALN + "lr_key_position_embedding": "lr_key_position",
}
# In the published file, deliberately not read. {}: a layer's number.
_DROPPED = {
    ADALN + "k_layer_norm.{}.weight": "keys are normalised by q_layer_norm",
    ADALN + "k_layer_norm.{}.bias": "keys are normalised by q_layer_norm",
    "transformer.position_embeddings.weight": "positions are rotary",
}
# Left out of a file where they change nothing.
SEMANTIC = tuple(f"cond_embed.map_vector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias"))
FACTORS = ("up", "down")  # (out, rank) and (rank, in * 3 * 3), whose product the detailer adds to a kernel
ROPE_TABLES = (ADALN + "rope.freqs_cos", ADALN + "rope.freqs_sin")  # computed instead


def key_table(
    num_layers: int, predictor_depth: int = 0, conditioned: bool = False, detailed: bool = False
) -> dict[str, str]:
    """Name on disk -> name in the code, of every tensor that is used. conditioned: whether the predictor is; detailed:
    whether there is a detailer, whose kernels stand in the file as `FACTORS` of what they add to the predictor's."""
    modules = dict(_MODULES)
    if predictor_depth:
        ends = _PREDICTOR_ENDS + (_PREDICTOR_CONDITION if conditioned else ())
        block = (*_PREDICTOR_BLOCK, _PREDICTOR_MODULATION) if conditioned else _PREDICTOR_BLOCK
        names = [*ends, *(name.format(i) for name in block for i in range(predictor_depth))]
        for network in ("predictor", "detailer") if detailed else ("predictor",):
            modules |= {f"{network}.{name}": f"{network}.{name}" for name in names}
    for disk, code in _LAYER_MODULES.items():
        modules |= {disk.format(i): code.format(i) for i in range(num_layers)}
    table = {f"{disk}.{part}": f"{code}.{part}" for disk, code in modules.items() for part in ("weight", "bias")}
    for kernel in factored_kernels(predictor_depth) if detailed else ():
        del table[f"detailer.{kernel}.weight"]
        table |= {f"detailer.{kernel}.{factor}": f"detailer.{kernel}.{factor}" for factor in FACTORS}
    return table | _PARAMETERS


def factored_kernels(predictor_depth: int) -> list[str]:
    """The predictor's convolutions whose kernels the detailer adds to."""
    return [name.format(i) for name in _PREDICTOR_BLOCK for i in range(predictor_depth)]


def dropped_keys(num_layers: int) -> dict[str, str]:
    """Name on disk -> why it isn't read, CLIP tower apart."""
    dropped = {name.format(i): why for name, why in _DROPPED.items() for i in range(num_layers)}
    return dropped | dict.fromkeys(ROPE_TABLES, "rotations are computed")
