"""The planner against the published figures and against what is allocated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldkv.artifact import read_manifest
from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_config, spec_from_file
from foldkv.export.contract.geometry import ModelSpec
from foldkv.export.contract.state import state_tensors, total_bytes
from foldkv.export.memory import BLOCK_ROOM, activations, parameter_count, parameter_groups, plan_memory, table_bytes
from foldkv.export.model.decoder import Decoder
from foldkv.optimize.fit import graph_bytes, plan_target
from foldkv.optimize.passes.lower import LOW_PRECISION
from foldkv.optimize.targets import load_targets
from foldkv.runtime.session import Session

DATA = Path(__file__).parents[1] / "data"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MILLION, GIB = 1 << 20, 1 << 30


def spec(name: str) -> ModelSpec:
    return spec_from_file(DATA / f"deepseek-v4-{name}.json")


@pytest.mark.parametrize(
    ("name", "layout", "gib"),
    [
        ("flash", "fp8+fp4", 3.43), ("pro", "fp8+fp4", 4.91), ("flash", "fp8", 3.76), ("pro", "fp8", 5.38),
        ("flash", "bf16", 6.72), ("pro", "bf16", 9.62), ("flash", "nvfp4+fp4", 2.38), ("pro", "nvfp4+fp4", 3.40),
    ],
)  # fmt: skip
def test_the_growing_caches_at_one_million_tokens_have_the_published_sizes(name: str, layout: str, gib: float) -> None:
    assert plan_memory(spec(name), context=MILLION, layout=layout).growing / GIB == pytest.approx(gib, abs=0.006)


@pytest.mark.parametrize(("name", "share"), [("flash", 0.0731), ("pro", 0.1047)])
def test_the_share_of_v32_is_the_published_one(name: str, share: float) -> None:
    plan = plan_memory(spec(name), context=MILLION)
    assert plan.v32 / GIB == pytest.approx(46.94, abs=0.005)
    assert plan.share_of_v32 == pytest.approx(share, abs=0.00005)


@pytest.mark.parametrize(("name", "window", "carry"), [("flash", 3.07, 1.76), ("pro", 4.35, 2.53)])
def test_the_parts_that_do_not_grow_have_the_published_sizes(name: str, window: float, carry: float) -> None:
    plan = plan_memory(spec(name), context=MILLION)
    assert plan.groups["window"] / (1 << 20) == pytest.approx(window, abs=0.006)
    carried = sum(size for group, size in plan.groups.items() if "carry" in group)
    assert carried / (1 << 20) == pytest.approx(carry, abs=0.006)


@pytest.mark.parametrize("context", [1, 255, 4096, MILLION])
def test_the_float32_plan_is_what_the_state_takes(context: int) -> None:
    model = spec("flash")
    plan = plan_memory(model, context=context, batch=3, layout="float32")
    assert plan.total == total_bytes(state_tensors(model), context, 3)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    model = spec(name)
    with torch.device("meta"):
        decoder = Decoder(model)
    assert parameter_count(model) == sum(parameter.numel() for parameter in decoder.parameters())
    assert parameter_count(model) / 1e9 == pytest.approx({"flash": 284, "pro": 1573}[name], rel=0.02)
    assert table_bytes(model) == sum(b.nbytes for key, b in decoder.named_buffers() if key.endswith("tid2eid"))


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_groups_of_parameters_are_those_that_lowering_tells_apart(name: str) -> None:
    model = spec(name)
    with torch.device("meta"):
        parameters = dict(Decoder(model).named_parameters())
    roles = {key: re.sub(r"^layers\.\d+\.", "", key) for key in parameters}
    low = {key: any(re.fullmatch(pattern, role) for pattern in LOW_PRECISION) for key, role in roles.items()}

    def count(*marks: str) -> int:
        return sum(p.numel() for key, p in parameters.items() if low[key] and any(mark in key for mark in marks))

    groups = parameter_groups(model)
    assert groups["experts"] == count(".ffn.experts.")
    assert groups["projections"] == count(".attn.", ".shared_experts.")
    assert groups["ends"] == count("embed.", "head.")
    assert groups["precise"] == sum(p.numel() for key, p in parameters.items() if not low[key])


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (97, 3), (4096, 2)])
def test_a_session_allocates_what_the_plan_says(
    tiny_checkpoint: Path, tiny_bundle: Path, context: int, batch: int
) -> None:
    plan = plan_memory(spec_from_file(tiny_checkpoint), context=context, batch=batch, layout="float32")
    with Session(tiny_bundle, context=context, batch=batch) as session:
        assert session.state_bytes == plan.total


# Activations


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "chunk", "context"), [(1, 1024, 4096), (1, 64, 65536)])
def test_a_chunk_takes_what_the_plan_estimates(
    tiny_checkpoint: Path, tiny_bundle: Path, batch: int, chunk: int, context: int
) -> None:
    """The window's logits take most of the first, the indexer's block of the second. Within a factor of 1.5."""
    words = ["--measure", str(tiny_bundle), *map(str, (batch, chunk, context))]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "activations.py"), *words], check=True, capture_output=True, text=True
    )
    planned = activations(spec_from_file(tiny_checkpoint), context=context, batch=batch, chunk=chunk, room=BLOCK_ROOM)
    assert planned.total(reuse=False) / 1.5 < int(run.stdout) < planned.total(reuse=False) * 1.5


def test_the_measured_activations_are_those_of_the_present_formula(tiny_checkpoint: Path) -> None:
    results = json.loads((BENCHMARKS / "results" / "activations.json").read_text())
    models = {
        "tiny-v4": spec_from_file(tiny_checkpoint), "wide": spec_from_config(results["models"]["wide"])
    }  # fmt: skip
    rows = results["rows"]
    assert {(row["backend"], row.get("model")) for row in rows} == {
        ("onnxruntime", None), ("tensorrt-rtx", "tiny-v4"), ("tensorrt-rtx", "wide")
    }  # fmt: skip
    for row in rows:
        engine = row["backend"] == "tensorrt-rtx"
        plan = activations(
            models[row.get("model", "tiny-v4")], context=row["context"], batch=row["batch"], chunk=row["chunk"], plugins=row.get("plugins", False),
            weight_item=2 if engine else 4, room=None if engine else BLOCK_ROOM,
        )  # fmt: skip
        assert plan.total(reuse=engine) == row["planned"]
        assert 1 / 1.5 < row["measured"] / row["planned"] < 1.5


@given(
    context=st.integers(1, MILLION), batch=st.integers(1, 64), chunk=st.integers(1, 4096), plugins=st.booleans(),
    reuse=st.booleans(), more=st.sampled_from(["context", "batch", "chunk"]), room=st.sampled_from([None, BLOCK_ROOM]),
)  # fmt: skip
@settings(deadline=None)
def test_more_work_never_takes_less_memory(
    context: int, batch: int, chunk: int, plugins: bool, reuse: bool, more: str, room: int | None
) -> None:
    sizes = {"context": context, "batch": batch, "chunk": chunk}
    less = activations(spec("flash"), **sizes, plugins=plugins, room=room)
    sizes[more] *= 2
    assert activations(spec("flash"), **sizes, plugins=plugins, room=room).total(reuse=reuse) >= less.total(reuse=reuse)
    assert activations(spec("flash"), **sizes, plugins=True).attention <= activations(spec("flash"), **sizes).attention


# Disk


def test_graph_and_cpu_bundle_weigh_what_the_plan_says(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path
) -> None:
    model = spec_from_file(tiny_checkpoint)
    bundle = plan_target(model, load_targets()["cpu"], context=64, stored="bf16").bundle
    for folder, kind, planned in ((tiny_graph, "graph", graph_bytes(model, "bf16")), (tiny_bundle, "bundle", bundle)):
        files = read_manifest(folder, kind=f"foldkv.{kind}")["files"].values()
        assert sum(facts["bytes"] for facts in files) == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": 2 * MILLION}, "takes 1 to 1048576"),
        ({"context": 1, "batch": 0}, "batch is 0"),
        ({"context": 1, "layout": "int3"}, "layout 'int3' is not known"),
    ],
)
def test_a_wrong_question_is_refused(arguments: dict[str, int], finding: str) -> None:
    with pytest.raises(InputError, match=finding):
        plan_memory(spec("flash"), **arguments)  # type: ignore[arg-type]
