"""What the declarations of operators promise each other and the state of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.operators import STATE, expected_operators, operator_specs
from foldkv.export.contract.profiles import HF, PROFILES, SERVED
from foldkv.export.contract.rows import row_format_named
from foldkv.export.contract.state import state_tensors

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
