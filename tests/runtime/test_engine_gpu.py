"""An engine with plugins, executed on the GPU that is here, beside the cpu bundle of the same graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foldkv.optimize.build import build_bundles
from foldkv.optimize.recipe import Shapes
from foldkv.optimize.targets import load_targets
from foldkv.plugins.cuda import device_capability
from foldkv.runtime.session import Session

SM = device_capability()
TARGETS = [target.name for target in load_targets().values() if target.sm == SM and SM is not None]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not TARGETS, reason="needs an NVIDIA GPU that is a target; here is none"),
]
PROMPTS = [[84, 104, 101, *range(40, 120)], [65, 66, 67]]


@pytest.mark.parametrize(
    ("plugins", "layout", "agreement"), [(False, "dense", 0.9), (True, "dense", 0.9), (True, "fp8+fp4", 0.7)]
)
def test_an_engine_decodes_as_the_cpu_bundle_does(
    tiny_graph: Path, tiny_bundle: Path, tmp_path: Path, plugins: bool, layout: str, agreement: float
) -> None:
    """bfloat16 products move logits by about 1e-2 of their spread: most greedy tokens agree, and none is far off."""
    shapes = Shapes(batch=(1, 2, 2), chunk=(1, 1, 64), context=(64, 256, 512))
    [result] = build_bundles(tiny_graph, tmp_path, TARGETS[:1], plugins=plugins, layout=layout, shapes=shapes).results
    if result.status == "failed" and result.exit_code == 3:
        pytest.skip(result.reason)
    assert result.status == "built", result.reason
    with Session(result.folder, context=256, batch=2) as ours, Session(tiny_bundle, context=256, batch=2) as theirs:
        one, other = ours.prefill(PROMPTS), theirs.prefill(PROMPTS)
        spread = other.std()
        assert np.isfinite(one).all() and np.abs(one - other).max() < spread
        same = 0
        for _ in range(20):
            tokens = other.argmax(-1).tolist()
            same += int((one.argmax(-1) == other.argmax(-1)).sum())
            one, other = ours.decode(tokens), theirs.decode(tokens)
        assert same >= agreement * 40
        first = ours.snapshot()
        again = [ours.decode([65, 66]) for _ in range(3)]
        ours.restore(first)
        for step in again:
            np.testing.assert_array_equal(ours.decode([65, 66]), step)
