"""The table of a bundle's engines: what is written is read back, and what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foldkv.errors import ArtifactError
from foldkv.export.contract.chain import ITEM_BYTES, Call
from foldkv.export.contract.engine_set import CONVERTED, DEQUANTISED, STORED, WORDS, EngineTable, Taken

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
ROWS = st.one_of(
    st.builds(Taken, st.sampled_from([STORED, CONVERTED]), st.sampled_from(list(ITEM_BYTES)), SHAPES),
    st.builds(
        Taken, st.just(DEQUANTISED), st.just("bfloat16"), SHAPES, st.text(min_size=1, max_size=5),
        st.tuples(st.integers(1, 128), st.integers(1, 128)),
    ),
    st.builds(
        Taken, st.just(WORDS), st.just("int32"), SHAPES,
        spans=st.lists(st.tuples(*[st.integers(0, 99)] * 3), max_size=3).map(tuple),
    ),
)  # fmt: skip
TABLE = EngineTable(
    {"step": "engines/step.plan", "head": "engines/head.plan"}, (Call("head", "head"),),
    {"step": {}, "head": {"head.weight": Taken(CONVERTED, "bfloat16", (4, 8))}},
)  # fmt: skip


# Each example is a file; the first one also waits for imports.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["attn.wq_a.weight", "ffn.experts.codes", "ö"]), ROWS))
def test_a_table_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, roles: dict[str, Taken]
) -> None:
    path = tmp_path_factory.mktemp("table") / "engines.json"
    calls = (Call("layers.0", "kind"), Call("layers.1", "kind"))
    table = EngineTable({"step": "a", "kind": "b"}, calls, {"step": {}, "kind": roles})
    table.write(path)
    assert EngineTable.read(path) == table
    assert table.weight_bytes == 2 * sum(taken.bytes for taken in roles.values())


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda t: t.update(version=9), "version 9, expected 1"),
        (lambda t: t["plans"].pop("step"), "no segment step"),
        (lambda t: t["weights"].pop("head"), "no segment head"),
        (lambda t: t.pop("calls"), "KeyError"),
        (lambda t: t["weights"]["head"].update({"head.weight": ["bent", "float32", [1]]}), "'bent'"),
        (lambda t: t["weights"]["head"].update({"head.weight": [STORED, "float3", [1]]}), "'float3'"),
        (lambda t: t["weights"]["head"].update({"head.weight": [STORED, "float32", [-1]]}), "shape"),
        (lambda t: t["weights"]["head"].update({"head.weight": [DEQUANTISED, "float32", [1]]}), "dequantised by ''"),
        (lambda t: t["weights"]["head"].update({"head.weight": []}), "ValueError"),
    ],
)
def test_a_damaged_table_is_refused_with_its_reason(change: Any, finding: str, tmp_path: Path) -> None:
    TABLE.write(tmp_path / "engines.json")
    content = json.loads((tmp_path / "engines.json").read_text())
    change(content)
    (tmp_path / "engines.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"is no table of engines .*Make the bundle again") as error:
        EngineTable.read(tmp_path / "engines.json")
    assert finding in str(error.value)
    with pytest.raises(ArtifactError, match="is no table of engines"):
        EngineTable.read(tmp_path / "none.json")
