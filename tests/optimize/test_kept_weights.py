"""What the cpu's bundles read in a step, and about how long that takes, by the format of the checkpoint's experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from foldkv.backends import FLOAT32, FP4, FP8
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract import step_time
from foldkv.export.memory import parameter_groups
from foldkv.optimize.kept_weights import cpu_step_seconds, wide_matrix_bytes

FLASH = spec_from_file(Path(__file__).parents[1] / "data" / "deepseek-v4-flash.json")
TINY = Path(__file__).parents[2] / "examples" / "tiny-v4" / "config.json"
CHOSEN = parameter_groups(FLASH)["experts"] * 6 // 256


def test_experts_in_e4m3_are_decoded_in_every_form() -> None:
    """ONNX Runtime multiplies with e2m1 as it is, and has no kernel for e4m3."""
    for matrices in (step_time.BFLOAT16, step_time.FLOAT32):
        stacked, decoded = (cpu_step_seconds(FLASH, stored, matrices=matrices) for stored in (FP4, FP8))
        assert decoded - stacked == pytest.approx((1.8 - 0.05) * CHOSEN / 1e9)
    assert (
        cpu_step_seconds(FLASH, FP4, matrices="stored")
        == cpu_step_seconds(FLASH, FP8, matrices="stored")
        > step_time.VALIDATION
    )
    assert "for validation only" in step_time.warning(cpu_step_seconds(FLASH, FP8, matrices="float32"))
    # QMoE takes whole blocks of 32.
    odd = replace(FLASH, moe_intermediate_size=2000)
    assert cpu_step_seconds(odd, FP4, matrices="bfloat16") == cpu_step_seconds(odd, FP8, matrices="bfloat16")


def test_float32_is_a_form_of_its_own_only_where_bfloat16_is_one() -> None:
    assert wide_matrix_bytes(FLASH, FP4) == wide_matrix_bytes(FLASH, FP8) == pytest.approx(4 * 6.7e9, rel=0.01)
    assert wide_matrix_bytes(FLASH, FLOAT32) == 0
    assert wide_matrix_bytes(spec_from_file(TINY), FP4) == 0, "the build places them"
    ours, theirs = (cpu_step_seconds(FLASH, FP4, matrices=way) for way in ("float32", "bfloat16"))
    assert theirs - ours == pytest.approx((0.62 - 0.17) * wide_matrix_bytes(FLASH, FP4) / 4 / 1e9)
