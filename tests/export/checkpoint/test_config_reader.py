"""Reading config.json against transformers' DeepseekV4Config: the same facts from every spelling, or a refusal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config
from transformers import logging as transformers_logging
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from foldkv.errors import CheckpointError
from foldkv.export.checkpoint.config_reader import read_model, spec_from_config, spec_from_file
from foldkv.export.contract.geometry import CSA, HCA, SLIDING, ModelSpec
from foldkv.export.model.rope import inverse_frequencies

FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1,
    "q_lora_rank": 12, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, "index_n_heads": 2, "index_head_dim": 32,
    "index_topk": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
}  # fmt: skip
RATIOS = {SLIDING: 0, CSA: 4, HCA: 128}
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


def same_facts(spec: ModelSpec, config: DeepseekV4Config) -> None:
    """Every fact that has two spellings, and the frequencies that transformers computes from them."""
    assert spec.layer_types == tuple(config.layer_types)
    assert spec.ratios == tuple(config.compress_rates[k] if k != SLIDING else 0 for k in config.layer_types)
    assert spec.hash_layers == tuple(kind == "hash_moe" for kind in config.mlp_layer_types)
    assert spec.num_experts == config.n_routed_experts == config.num_local_experts
    assert spec.moe_intermediate_size == config.moe_intermediate_size == config.intermediate_size
    assert spec.max_position_embeddings == config.max_position_embeddings
    main, compress = config.rope_parameters["main"], config.rope_parameters["compress"]
    assert (spec.rope_theta, spec.compress_rope_theta) == (main["rope_theta"], compress["rope_theta"])
    rotary = DeepseekV4RotaryEmbedding(config)
    for kind, label in ((SLIDING, "main"), (CSA, "compress"), (HCA, "compress")):
        theirs = getattr(rotary, f"{label}_inv_freq")
        assert spec.rope_dim == 2 * len(theirs)
        assert torch.allclose(inverse_frequencies(spec, kind), theirs, rtol=1e-6, atol=0)
        assert getattr(rotary, f"{label}_attention_scaling") == 1


@st.composite
def spelled(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration with random facts; each fact in the released spelling, in transformers' or in both."""

    def spellings(*parts: dict[str, Any]) -> dict[str, Any]:
        return {
            k: v for part in draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2)) for k, v in part.items()
        }

    layers = draw(st.integers(1, 5))
    types = draw(st.lists(st.sampled_from([SLIDING, CSA, HCA]), min_size=layers, max_size=layers))
    released_rates = draw(st.booleans())
    rates = {CSA: 4, HCA: 128} if released_rates else {CSA: draw(st.integers(1, 9)), HCA: draw(st.integers(1, 200))}
    ratios = [0 if kind == SLIDING else rates[kind] for kind in types]
    config = FIXED | {"num_hidden_layers": layers}
    if released_rates:
        config |= spellings({"layer_types": types}, {"compress_ratios": [*ratios, *draw(st.sampled_from([[], [0]]))]})
    else:
        config |= {"layer_types": types} | spellings(
            {"compress_rates": rates}, {"compress_rate_csa": rates[CSA], "compress_rate_hca": rates[HCA]}
        )
        config |= draw(st.sampled_from([{}, {"compress_ratios": ratios}]))
    hashed = draw(st.integers(0, layers + 1))
    config |= spellings(
        {"num_hash_layers": hashed}, {"mlp_layer_types": [*["hash_moe"] * hashed, *["moe"] * layers][:layers]}
    )
    experts, inner = draw(st.integers(2, 9)), draw(st.integers(1, 9))
    config |= spellings({"n_routed_experts": experts}, {"num_local_experts": experts})
    config |= spellings({"moe_intermediate_size": inner}, {"intermediate_size": inner})
    return config | draw(ropes())


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    head = draw(st.sampled_from([16, 24, 32, 64]))
    width = draw(st.sampled_from([2, 4, 8, 16]))
    theta, compress = draw(st.sampled_from([10000, 500.0, 5e6])), draw(st.sampled_from([160000.0, 700, 1e7]))
    yarn = draw(st.sampled_from([
        {}, {"factor": 16, "original_max_position_embeddings": 64},
        {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 8, "beta_slow": 2}, {"factor": 2, "truncate": True},
    ]))  # fmt: skip
    kind = "yarn" if yarn else "default"
    name = draw(st.sampled_from(["rope_type", "type"]))
    top = {"head_dim": head, "rope_theta": theta, "compress_rope_theta": compress}
    widths = draw(st.sampled_from([
        {"qk_rope_head_dim": width}, {"partial_rotary_factor": width / head},
        {"qk_rope_head_dim": width, "partial_rotary_factor": width / head},
    ]))  # fmt: skip
    flat = {**yarn, name: kind} | draw(
        st.sampled_from([{}, {"rope_theta": theta}, {"rope_theta": compress}, {"partial_rotary_factor": width / head}])
    )
    own = {"partial_rotary_factor": width / head}
    scale = {"attention_factor": 1.0} if yarn else {}
    nested = {
        "main": {"rope_type": "default", "rope_theta": theta, **own},
        "compress": {name: kind, "rope_theta": compress, **own, **yarn, **scale},
    }
    form = draw(st.sampled_from(["flat", "nested", "defaults beside", "only nested", "both", "none"]))
    label = draw(st.sampled_from(["rope_scaling", "rope_parameters"]))
    if form == "none":
        return top | widths | draw(st.sampled_from([{}, {label: None}, {label: {}}]))
    if form == "flat":
        return top | widths | {label: flat}
    if form == "nested":
        return top | widths | {label: nested}
    if form == "defaults beside":  # as transformers saves a model whose rope_parameters alone were given
        return {
            "head_dim": head, "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "partial_rotary_factor": 0.125,
            "qk_rope_head_dim": int(head * 0.125), label: nested,
        }  # fmt: skip
    if form == "only nested":
        return {"head_dim": head, label: nested}
    return top | widths | {"rope_scaling": flat, "rope_parameters": nested}


@SETTINGS
@given(config=spelled())
def test_every_spelling_gives_what_transformers_computes_with(config: dict[str, Any]) -> None:
    text = json.dumps(config)
    same_facts(spec_from_config(json.loads(text)), DeepseekV4Config(**json.loads(text)))


@SETTINGS
@given(config=spelled())
def test_what_transformers_saves_again_is_the_same_model(config: dict[str, Any], tmp_path: Path) -> None:
    DeepseekV4Config(**json.loads(json.dumps(config))).save_pretrained(tmp_path)
    saved = spec_from_file(tmp_path)
    same_facts(saved, DeepseekV4Config.from_pretrained(tmp_path))
    expected = spec_from_config(config)
    assert (saved.layer_types, saved.ratios, saved.hash_layers) == (
        expected.layer_types, expected.ratios, expected.hash_layers,
    )  # fmt: skip
    assert (saved.rope_theta, saved.compress_rope_theta, saved.rope_dim, saved.yarn) == (
        expected.rope_theta, expected.compress_rope_theta, expected.rope_dim, expected.yarn,
    )  # fmt: skip


POOL: dict[str, list[Any]] = {
    "rope_theta": [10000, 160000, 500.0], "compress_rope_theta": [10000, 160000, 700], "head_dim": [16, 32],
    "rope_scaling": [None, {}, {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64}, {"factor": 4}],
    "rope_parameters": [None, {"rope_type": "default"}, {"main": {"rope_theta": 500.0}}, {"compress": {"rope_theta": 700}}],
    "partial_rotary_factor": [None, 0.5, 0.125], "qk_rope_head_dim": [None, 2, 8, 16],
    "layer_types": [None, [SLIDING, CSA], [HCA, CSA, SLIDING, CSA, HCA]], "num_hidden_layers": [1, 2],
    "compress_ratios": [None, [0, 4], [128, 4, 0, 4, 128], [0, 8]],
    "compress_rates": [None, {CSA: 4, HCA: 128}, {CSA: 8, HCA: 128}, {CSA: 4}], "compress_rate_csa": [None, 4, 8],
    "compress_rate_hca": [None, 128, 16], "mlp_layer_types": [None, ["hash_moe", "moe"], ["moe", "hash_moe"]],
    "num_hash_layers": [None, 0, 1, 5], "n_routed_experts": [8, 9], "num_local_experts": [7, 8],
    "moe_intermediate_size": [16, 17], "intermediate_size": [15, 16], "max_position_embeddings": [2048],
}  # fmt: skip
BRANCH_POOL: dict[str, list[Any]] = {
    "rope_type": ["default", "yarn"], "type": ["default", "yarn"], "rope_theta": [10000, 160000, 500.0],
    "partial_rotary_factor": [0.5, 0.25, 0.125], "factor": [1, 4, 4.0], "original_max_position_embeddings": [64, 128],
    "attention_factor": [None, 1.0, 0.5], "mscale": [0.7, 1.0], "mscale_all_dim": [0.7, 1.0], "beta_fast": [None, 8],
    "truncate": [False, True], "main": [None], "compress": [None],
}  # fmt: skip
MISSING = object()


@st.composite
def tampered(draw: st.DrawFn) -> dict[str, Any]:
    """A whole configuration in which up to three keys, at the top or in a table, were removed or have another value."""
    config: dict[str, Any] = json.loads(json.dumps(draw(spelled())))
    for _ in range(draw(st.integers(1, 3))):
        tables = [config, config]
        for label in ("rope_scaling", "rope_parameters"):
            table = config.get(label) or {}
            tables += [item for item in (table, table.get("main"), table.get("compress")) if item]
        table = draw(st.sampled_from(tables))
        pool = POOL if table is config else BRANCH_POOL
        key = draw(st.sampled_from(sorted(pool)))
        value = draw(st.sampled_from([MISSING, *pool[key]]))
        if value is MISSING:
            table.pop(key, None)
        else:
            table[key] = value
    return config


#: With a branch that is null, transformers refuses yarn that does not say where it begins.
NULL_BRANCH = FIXED | {
    "num_hidden_layers": 1, "head_dim": 16, "rope_theta": 10000, "compress_rope_theta": 160000, "qk_rope_head_dim": 2,
    "layer_types": ["sliding_attention"], "num_hash_layers": 0, "n_routed_experts": 2, "moe_intermediate_size": 16,
    "rope_scaling": {"factor": 2, "rope_type": "yarn", "compress": None},
}  # fmt: skip


@pytest.mark.slow
@settings(SETTINGS, max_examples=120)
@given(config=tampered())
@example(config=NULL_BRANCH)
def test_any_mixture_of_spellings_is_read_as_transformers_reads_it_or_refused(config: dict[str, Any]) -> None:
    text = json.dumps(config)
    try:
        spec = spec_from_config(json.loads(text))
        theirs = DeepseekV4Config(**json.loads(text))
    except (CheckpointError, StrictDataclassError):
        return
    same_facts(spec, theirs)


RELEASED: dict[str, Any] = FIXED | {
    "num_hidden_layers": 2, "head_dim": 32, "rope_theta": 10000, "compress_rope_theta": 160000, "qk_rope_head_dim": 8,
    "compress_ratios": [0, 4, 0], "num_hash_layers": 1, "n_routed_experts": 8, "moe_intermediate_size": 16,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64},
}  # fmt: skip


def branches(**compress: Any) -> dict[str, Any]:
    """Nested rope_parameters of RELEASED, with changes of the compressed branch."""
    own = {"rope_theta": 160000, "partial_rotary_factor": 0.25, "attention_factor": 1.0}
    return {
        "main": {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_type": "default"},
        "compress": {**RELEASED["rope_scaling"], **own, **compress},
    }


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"num_local_experts": 9}, ("n_routed_experts is 8", "num_local_experts is 9")),
        ({"intermediate_size": 18}, ("moe_intermediate_size is 16", "intermediate_size is 18")),
        ({"layer_types": [SLIDING, HCA]}, ("compress_ratios[1] is 4", f"layer_types[1] is '{HCA}'")),
        ({"compress_rates": {CSA: 8, HCA: 128}}, ("compress_ratios[1] is 4", "compress_rates give 8")),
        (
            {
                "compress_ratios": None,
                "layer_types": [HCA, CSA],
                "compress_rates": {CSA: 8, HCA: 128},
                "compress_rate_csa": 4,
            },
            ("compress_rate_csa is 4", f"compress_rates['{CSA}'] is 8"),
        ),
        ({"mlp_layer_types": ["moe", "moe"]}, ("num_hash_layers is 1", "mlp_layer_types has 'hash_moe' at []")),
        ({"partial_rotary_factor": 0.5}, ("qk_rope_head_dim is 8", "partial_rotary_factor is 0.5")),
        (
            {"rope_scaling": RELEASED["rope_scaling"] | {"rope_theta": 77}},
            ("rope_scaling.rope_theta is 77", "rope_theta is 10000"),
        ),
        (
            {"rope_scaling": None, "rope_parameters": branches(), "rope_theta": 500},
            ("rope_parameters.main.rope_theta is 10000", "rope_theta is 500"),
        ),
        (
            {"rope_scaling": None, "rope_parameters": branches(), "compress_rope_theta": 500},
            ("rope_parameters.compress.rope_theta is 160000", "compress_rope_theta is 500"),
        ),
        (
            {"rope_scaling": None, "rope_parameters": branches(rope_theta=None)},
            ("transformers takes rope_theta, 10000", "not compress_rope_theta, 160000"),
        ),
        (
            {"rope_scaling": None, "rope_parameters": branches(), "qk_rope_head_dim": 16},
            ("rope_parameters rotates 8 of 32", "qk_rope_head_dim says 16"),
        ),
        (
            {"rope_scaling": None, "rope_parameters": branches(partial_rotary_factor=0.5)},
            ("rotates 8 channels in main", "16 in compress"),
        ),
        ({"rope_parameters": branches(factor=8)}, ("rope_scaling gives", "factor=16.0", "factor=8.0")),
        (
            {"rope_scaling": RELEASED["rope_scaling"] | {"rope_type": "default"}},
            ("rope_scaling.rope_type is 'default'", "rope_scaling.type is 'yarn'"),
        ),
        (
            {"rope_scaling": {"compress": branches()["compress"]}},
            ("rope_scaling has 'main' None and 'compress' {", "Give both as objects"),
        ),
        (
            {"rope_scaling": None, "rope_parameters": branches() | {"factor": 40}},
            ("rope_parameters.factor is 40", "compress has 16"),
        ),
        (
            {"rope_scaling": None, "rope_parameters": branches(attention_factor=None)},
            ("has no attention_factor", "scales cos and sin by 1.277"),
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_with_both_values(
    change: dict[str, Any], both: tuple[str, ...]
) -> None:
    assert spec_from_config(RELEASED).rope_dim == 8
    with pytest.raises(CheckpointError) as caught:
        spec_from_config(RELEASED | change)
    for part in both:
        assert part in str(caught.value)


def test_thetas_of_the_branches_count_beside_the_defaults_that_transformers_writes(tmp_path: Path) -> None:
    own = {"partial_rotary_factor": 0.25, "rope_type": "default"}
    DeepseekV4Config(
        **FIXED | {"num_hidden_layers": 1, "head_dim": 32, "layer_types": [CSA]},
        rope_parameters={"main": own | {"rope_theta": 500.0}, "compress": own | {"rope_theta": 700.0}},
    ).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["rope_theta"], saved["compress_rope_theta"], saved["partial_rotary_factor"]) == (10000, 160000, 0.125)
    spec = spec_from_file(tmp_path)
    assert (spec.rope_theta, spec.compress_rope_theta, spec.rope_dim) == (500, 700, 8)


HARMLESS: dict[str, Any] = {
    "_attn_implementation_autoset": True, "unsloth_version": "2026.1", "pretraining_tp": 1, "n_group": 1, "topk_group": 1,
    "temperature": 0.6, "num_experts": 8, "v_head_dim": 32, "qk_nope_head_dim": 24, "first_k_dense_replace": 0,
    "original_max_position_embeddings": 64, "attn_logit_softcapping": None,
}  # fmt: skip


def test_harmless_keys_are_a_warning_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    scaling = RELEASED["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}
    config = RELEASED | HARMLESS | {"rope_scaling": scaling}
    reading = read_model(config, source="harmless/config.json")
    assert reading.spec == spec_from_config(RELEASED)
    assert reading.config == RELEASED and reading.allowed == ()
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelname == "WARNING" and text.startswith("harmless/config.json: ignored")
    assert all(name in text for name in (*HARMLESS, "rope_scaling.mscale", "rope_scaling.mscale_all_dim"))
    read_model(config, source="harmless/config.json")
    assert len(caplog.records) == 1  # said once, however often a command reads the file


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("n_group", 8, "n_group is 8: experts would be chosen group by group"),
        ("first_k_dense_replace", 3, "first_k_dense_replace is 3: some layers would have no experts"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping is 30.0: logits would be scaled or capped"),
        ("per_layer_config", {"0": {}}, "layers would differ in more than their kind"),
        ("num_experts", 9, "num_experts is 9; the other keys give 8"),
        ("my_router", "new", "unknown key 'my_router' with value 'new'"),
    ],
)
def test_a_key_that_changes_the_computation_is_refused_unless_allowed(
    caplog: pytest.LogCaptureFixture, key: str, value: Any, why: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_from_config(RELEASED | {key: value})
    assert why in str(caught.value) and f"--allow-unknown-key {key}" in str(caught.value)
    reading = read_model(RELEASED | {key: value}, source=f"{key}/config.json", allow_unknown_keys=[key, "absent"])
    assert reading.spec == spec_from_config(RELEASED)
    assert reading.allowed == (key,) and reading.config == RELEASED
    assert f"ignored, because you allowed it: {key}" in caplog.text


def test_a_nested_key_is_allowed_by_its_dotted_name() -> None:
    config = RELEASED | {"rope_scaling": RELEASED["rope_scaling"] | {"mscale": 0.7}}
    with pytest.raises(CheckpointError, match=r"--allow-unknown-key rope_scaling\.mscale"):
        spec_from_config(config)
    reading = read_model(config, allow_unknown_keys=["rope_scaling.mscale"])
    assert reading.config == RELEASED


def test_a_key_that_is_read_cannot_be_ignored() -> None:
    with pytest.raises(CheckpointError, match="hidden_size was allowed as an unknown key, but foldkv reads it"):
        spec_from_config(RELEASED, allow_unknown_keys=["hidden_size"])


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("hiden_size", " (did you mean 'hidden_size'?)"),
        ("rope_scalings", " (did you mean 'rope_scaling'?)"),
        ("my_router", ""),
    ],
)
def test_a_name_is_offered_only_for_a_near_miss(key: str, hint: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_from_config({name: value for name, value in RELEASED.items() if name != "hidden_size"} | {key: 1})
    text = str(caught.value)
    assert f"unknown key {key!r} with value 1{hint}\n" in text
    if key == "hiden_size":  # to ignore a slip would lose what it says
        assert "--allow-unknown-key" not in text


ODD: list[Any] = [
    None, True, -1, 0, 1.5, 10**400, float("inf"), float("nan"), "", "x", [], [[]], [None], [{}], {}, {"main": {}, "compress": {}},
    {"main": [], "compress": {}}, {"rope_type": [], "factor": {}}, {CSA: [], HCA: 10**400}, ["x", 10**400],
]  # fmt: skip


@pytest.mark.parametrize("key", [*POOL, *FIXED, "my_router", "n_group", "num_experts", "eos_token_id"])
def test_values_of_any_kind_are_read_or_refused(key: str) -> None:
    for value in ODD:
        with contextlib.suppress(CheckpointError):
            spec_from_config(RELEASED | {key: value})


@pytest.mark.parametrize("key", BRANCH_POOL)
def test_values_of_any_kind_inside_the_tables_are_read_or_refused(key: str) -> None:
    for value in ODD:
        for label in ("rope_scaling", "rope_parameters"):
            tables = [
                RELEASED["rope_scaling"] | {key: value},
                branches(**{key: value}),
                {"rope_type": "default", key: value},
            ]
            for table in tables:
                with contextlib.suppress(CheckpointError):
                    spec_from_config(RELEASED | {"rope_scaling": None, label: table})
