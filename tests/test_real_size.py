"""A released checkpoint's real size: from headers to bundles for several GPUs, on a small machine, as examples/ shows it."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import sparse_checkpoint
from layer_times import Floors
from step_traffic import traffic

from foldkv.export.contract.engine_set import ENGINES, EngineTable
from foldkv.export.package import read_package
from foldkv.manifests import BundleManifest, read
from foldkv.optimize.build import build_bundles
from foldkv.optimize.fit import plan_target
from foldkv.optimize.targets import load_targets
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.engine_part import part_bytes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CONTEXT = 1 << 16
TARGETS = ("l40s", "rtx4090", "rtx5090", "rtxpro6000")  # two pairs of one compute capability


def test_the_example_takes_v4_flash_to_bundles_for_four_gpus(tmp_path: Path) -> None:
    """On sparse files: headers, names, types and shapes are the released ones; weights are holes."""
    sparse_checkpoint(ROOT / "tests" / "data" / "deepseek-v4-flash.json", tmp_path / "DeepSeek-V4-Flash")
    (tmp_path / "DeepSeek-V4-Flash" / "tokenizer.json").write_bytes(
        (ROOT / "examples" / "tiny-v4" / "tokenizer.json").read_bytes()
    )
    shutil.copyfile(ROOT / "examples" / "v4-flash.toml", tmp_path / "pipeline.toml")
    done = subprocess.run(
        [sys.executable, "-m", "foldkv", "run", str(tmp_path / "pipeline.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 2 << 30, "of a child, this one's children included"
    bundles = tmp_path / "v4-flash" / "bundles"
    package = read_package(tmp_path / "v4-flash" / "graph")
    for name in TARGETS:
        bundle, table = load_bundle(bundles / name), EngineTable.read(bundles / name / ENGINES)
        assert sum(file.bytes for file in bundle.manifest.files.values()) < 30 << 20
        assert all(one.capture for one in (bundle.manifest.engine.segments or {}).values())
        assert (bundle.manifest.weights or {})["widened"] == []
        assert len(table.calls) == 45 and len(table.plans) == 7  # 43 layers of 4 kinds
        planned = plan_target(
            package.spec, load_targets()[name], context=CONTEXT, layout=bundle.manifest.layout, stored="fp4"
        )
        assert [part_bytes(table, call) for call in table.calls] == list(planned.call_weights["fp4"])
        assert sum(one.bytes(CONTEXT) for one in bundle.state.tensors) == sum(planned.call_state)
        floors = Floors(bundles / name, package.spec)  # what the GPU kit measures times beside
        read_bytes = sum(sum(floors.of_segment(call.segment, CONTEXT, 1).values()) for call in table.calls)
        assert 0.99 * read_bytes < planned.floor <= read_bytes
        assert bundle.largest("context") == 1 << 20 and set(bundle.in_place) == {t.name for t in bundle.state.tensors}
        assert bundle.manifest.build.peak_rss_bytes < 1 << 30
        for segment in table.plans:
            # A step only gathers a row of the embedding; there is nothing to compare with.
            step = traffic(bundles / name, package, segment, CONTEXT) if segment not in ("step", "embed") else None
            assert step is None or 1 <= step.ratio < 1.1, (segment, step)
            assert step is None or step.floor == sum(floors.of_segment(segment, CONTEXT, 1).values())
            assert step is None or step.widest[0] < 1 << 20, "no weight of a size that matters is written again"
    reused = [read(BundleManifest, bundles / name).engine.segments or {} for name in ("l40s", "rtx4090")]
    assert all(one.reused != other.reused for one, other in zip(*(r.values() for r in reused), strict=True))

    # The weights are gone: what has been built is enough to build again.
    shutil.rmtree(tmp_path / "DeepSeek-V4-Flash")
    [again] = build_bundles(
        tmp_path / "v4-flash" / "graph", tmp_path / "again", ["rtx5090"], layout="fp8+fp4", cache=tmp_path / "plans"
    ).results
    assert again.reason == "" and all(
        one.reused for one in (read(BundleManifest, again.folder).engine.segments or {}).values()
    )
