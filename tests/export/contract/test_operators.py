"""What the declarations of operators promise each other and the state of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.operators import (
    SCALE,
    STATE,
    WEIGHT,
    OperatorSpec,
    TensorSpec,
    expected_operators,
    operator_specs,
)
from foldkv.export.contract.profiles import HF, PROFILES, SERVED
from foldkv.export.contract.rows import row_format_named
from foldkv.export.contract.state import state_tensors
from foldkv.export.contract.weights import SCALE_TYPES, VALUES_PER_ELEMENT, WEIGHT_TYPES
from foldkv.export.operators.registry import schema, torch_schema

DATA = Path(__file__).parents[2] / "data"
FLASH = spec_from_file(DATA / "deepseek-v4-flash.json")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_part_of_the_state_is_written_by_operators_of_each_profile_and_nothing_else_is(profile: str) -> None:
    groups = {tensor.group for tensor in state_tensors(FLASH)}
    written = {group for spec in operator_specs().values() if profile in spec.profiles for group in spec.writes}
    assert written == groups
    assert {group for spec in operator_specs().values() for group in spec.reads} == groups


def test_rows_are_updated_or_it_is_said_how_they_are_read() -> None:
    for spec in operator_specs().values():
        for index, tensor in enumerate(spec.inputs):
            if tensor.dtype == STATE:
                assert tensor.groups and (index in spec.updates.values()) != bool(tensor.read), (spec.name, tensor.name)
        assert spec.rounds is None or row_format_named(spec.rounds).packed
        assert (spec.plugin is None) == bool(spec.no_plugin)


def test_a_model_of_43_layers_has_the_operators_of_its_kinds() -> None:
    """Counted by hand: V4-Flash has 2 sliding layers, then 21 CSA and 20 HCA layers in turn."""
    counts = expected_operators(FLASH, HF)
    assert counts["FoldkvCompress"] == 42 and counts["FoldkvCompressOnline"] == counts["FoldkvDenseAttention"] == 20
    assert counts["FoldkvWindowUpdate"] == 43 and counts["FoldkvWindowAttention"] == 2
    assert counts["FoldkvRope"] == 2 * 43 + 21 and counts["FoldkvSinkhorn"] == 86
    served = expected_operators(FLASH, SERVED)
    assert "FoldkvCompress" not in served and "FoldkvQuantizeFp8" not in counts
    assert (served["FoldkvCompressFp8"], served["FoldkvCompressFp4"], served["FoldkvQuantizeFp8"]) == (21, 21, 43)


WEIGHTED = OperatorSpec(
    "FoldkvWeighted", (TensorSpec("x", ("M", "K")), TensorSpec("weight", ("N", "K"), WEIGHT), TensorSpec("scale", ("N",), SCALE)),
    (TensorSpec("y", ("M", "N")),), attributes={"weight_format": str, "scale_format": str, "limit": float}, plugin="1",
)  # fmt: skip


def test_attributes_say_in_which_type_weights_are_stored() -> None:
    _, weight, scale = WEIGHTED.inputs
    given = {"weight_format": "e4m3", "scale_format": "float32"}
    assert [tensor.stored_type(given, rows="bfloat16") for tensor in WEIGHTED.inputs] == ["float32", "int8", "float32"]
    assert weight.stored_type(given | {"weight_format": "bfloat16"}, rows="") == "bfloat16"
    assert scale.stored_type(given | {"scale_format": "exponent"}, rows="") == "int8"
    with pytest.raises(InputError, match=r"weight_format is 'e5m2'; expected one of e4m3, e2m1, bfloat16\."):
        weight.stored_type(given | {"weight_format": "e5m2"}, rows="")
    with pytest.raises(InputError, match=r"scale_format is 'int8'; expected one of exponent, float32\."):
        scale.stored_type(given | {"scale_format": "int8"}, rows="")
    # An element of every format has whole values, and every type is one that graphs and plugins have.
    assert VALUES_PER_ELEMENT.keys() == WEIGHT_TYPES.keys()
    assert {*WEIGHT_TYPES.values(), *SCALE_TYPES.values()} <= {"int8", "bfloat16", "float32"}


def test_text_is_an_attribute_in_both_schemas() -> None:
    declared = "(Tensor x, Tensor weight, Tensor scale, str weight_format, str scale_format, float limit) -> Tensor"
    assert torch_schema(WEIGHTED) == declared
    kinds = {name: attribute.type.name for name, attribute in schema(WEIGHTED).attributes.items()}
    assert kinds == {"weight_format": "STRING", "scale_format": "STRING", "limit": "FLOAT"}
