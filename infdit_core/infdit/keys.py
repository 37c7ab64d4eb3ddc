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
# The predictor's, which the published file doesn't have, are called the same in both.
_PREDICTOR_ENDS = ("predictor.head", "predictor.tail")
_PREDICTOR_BLOCK = ("predictor.blocks.{}.conv_in", "predictor.blocks.{}.conv_out")
_PREDICTOR_CONDITION = tuple(f"predictor.condition.{i}" for i in range(3))
_PREDICTOR_MODULATION = "predictor.blocks.{}.modulation"
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
ROPE_TABLES = (ADALN + "rope.freqs_cos", ADALN + "rope.freqs_sin")  # computed instead


def key_table(num_layers: int, predictor_depth: int = 0, conditioned: bool = False) -> dict[str, str]:
    """Name on disk -> name in the code, of every tensor that is used. conditioned: whether the predictor is."""
    modules = dict(_MODULES)
    if predictor_depth:
        ends = _PREDICTOR_ENDS + (_PREDICTOR_CONDITION if conditioned else ())
        block = (*_PREDICTOR_BLOCK, _PREDICTOR_MODULATION) if conditioned else _PREDICTOR_BLOCK
        modules |= {name: name for name in ends}
        modules |= {name.format(i): name.format(i) for name in block for i in range(predictor_depth)}
    for disk, code in _LAYER_MODULES.items():
        modules |= {disk.format(i): code.format(i) for i in range(num_layers)}
    table = {f"{disk}.{part}": f"{code}.{part}" for disk, code in modules.items() for part in ("weight", "bias")}
    return table | _PARAMETERS


def dropped_keys(num_layers: int) -> dict[str, str]:
    """Name on disk -> why it isn't read, CLIP tower apart."""
    dropped = {name.format(i): why for name, why in _DROPPED.items() for i in range(num_layers)}
    return dropped | dict.fromkeys(ROPE_TABLES, "rotations are computed")
