"""Names of tensors: the three spellings that checkpoints use, and the released one that everything else speaks.

A checkpoint can use the released names (``layers.0.attn.wq_a.weight``), the same names as saved by transformers
(``model.layers.0.attn.wq_a.weight``), or transformers' module names (``model.layers.0.self_attn.q_a_proj.weight``). With
module names, experts are stacked, or single as in other models of Hugging Face
(``model.layers.0.mlp.experts.3.gate_proj.weight``). A quantised weight has its scale beside it: ``layers.0.attn.wq_a.scale``,
or ``…weight_scale_inv`` as saved by transformers.
"""

from __future__ import annotations

import re

# transformers' module names to released names, applied in order.
_RENAMES = [
    (re.compile(pattern), target)
    for pattern, target in (
        (r"^lm_head\.", "head."),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.compressor\.indexer\.scorer\.weights_proj\.", ".attn.indexer.weights_proj."),
        (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
        (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
        (r"(compressor)\.kv_norm\.", r"\1.norm."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),  # transformers 5 writes the released name like this
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.sinks$", ".attn_sink"),
        (r"\.position_bias$", ".ape"),
        (r"\.q_a_proj\.", ".wq_a."),
        (r"\.q_b_proj\.", ".wq_b."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.gate_proj\.", ".wgate."),
        (r"\.o_a_proj\.", ".wo_a."),
        (r"\.o_b_proj\.", ".wo_b."),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.experts\.gate_up_proj", ".experts.w13"),
        (r"\.experts\.down_proj", ".experts.w2"),
        (r"\.weight_scale(_inv)?$", ".scale"),  # of single weights, and of stacked experts, as transformers writes them
        (r"\.experts\.(w13|w2)_scale_inv$", r".experts.\1.scale"),
    )
]
_RELEASED_EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.\d+\.w[123]\.(weight|scale)$")
# Single experts, with the names that other models of Hugging Face and their tools use.
_NAMED_EXPERT = re.compile(
    r"(layers\.\d+)\.(?:mlp|ffn)\.(experts\.\d+)\.(gate|down|up)_proj\.(weight|scale|weight_scale(?:_inv)?)$"
)
_PARTS = {"gate": "w1", "down": "w2", "up": "w3"}


def released_name(name: str) -> str:
    """A tensor's name in the released spelling; released names are returned unchanged."""
    name = name.removeprefix("model.")
    if _RELEASED_EXPERT.match(name):  # nearly all names of a large checkpoint
        return name
    if expert := _NAMED_EXPERT.match(name):
        layer, which, part, kind = expert.groups()
        return f"{layer}.ffn.{which}.{_PARTS[part]}.{'weight' if kind == 'weight' else 'scale'}"
    for pattern, target in _RENAMES:
        name = pattern.sub(target, name)
    return name


def scale_name(name: str) -> str:
    """The released name of the scale of a weight."""
    return f"{name.removesuffix('.weight')}.scale"
