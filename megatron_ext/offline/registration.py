"""The order in which Megatron's modules register the parameters of a layer. Pure."""

from __future__ import annotations

#: The order in which a layer's modules are registered (core/transformer/transformer_layer.py:354,
#: attention.py:413, multi_latent_attention.py:509, moe/moe_layer.py:259 and
#: multi_token_prediction.py:983, 0.19.2). A norm that is fused into the next layer is registered
#: with that one.
_MODULES = (
    "enorm.",
    "hnorm.",
    "eh_proj.",
    "input_layernorm.",
    "self_attention.linear_proj.",
    "self_attention.linear_qkv.layer_norm_",
    "self_attention.linear_qkv.",
    "self_attention.linear_q_proj.",
    "self_attention.linear_q_down_proj.",
    "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.linear_q_up_proj.",
    "self_attention.linear_kv_down_proj.",
    "self_attention.linear_kv_up_proj.layer_norm_",
    "self_attention.linear_kv_up_proj.",
    "self_attention.q_layernorm.",
    "self_attention.k_layernorm.",
    "self_attention.kv_layernorm.",
    "pre_mlp_layernorm.",
    "mlp.router.",
    "mlp.fc1_latent_proj.",
    "mlp.fc2_latent_proj.",
    "mlp.experts.experts.linear_fc1.",
    "mlp.experts.experts.linear_fc2.",
    "mlp.shared_experts.gate_weight",
    "mlp.shared_experts.linear_fc1.",
    "mlp.shared_experts.linear_fc2.",
    "mlp.linear_fc1.layer_norm_",
    "mlp.linear_fc1.",
    "mlp.linear_fc2.",
    "final_layernorm.",
    "embedding.word_embeddings.",
    "embedding.position_embeddings.",
)
#: Norms that the local implementation registers as modules of their own.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
#: Above every number.
LAST = 2 * len(_MODULES)


def number(rest: str, local: bool) -> int | None:
    """Return a number that is larger the later a parameter is registered in its layer.

    Args:
        rest: Its name in the layer, or the name of what is in no layer.
        local: Whether the norms are modules of their own.

    Returns:
        None for a parameter that is in no module of the list.
    """
    if local:
        for fused, norm in _NORMS.items():
            rest = rest.replace(fused, norm)
    matching = [n for n, module in enumerate(_MODULES) if rest.startswith(module)]
    return 2 * min(matching) + rest.endswith("bias") if matching else None


def comes_first(one: str, two: str) -> bool:
    """Whether a parameter is registered before another one, whoever makes the norms."""
    for local in (False, True):
        a, b = number(one, local), number(two, local)
        if a is None or b is None or a >= b:
            return False
    return True
