"""What tests share: the trained model of this repository and smaller ones as checkpoint, graph package and CPU bundle.

Each is made once per run. Processes that run tests at once share them: the first one makes an artifact while the others
wait. Tracing takes half a minute for the trained model, so a test that needs no trained weights exports ``quick_checkpoint``.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports Triton: tests run its kernels in the interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
# Before anything imports torch: processes that run tests at once are as many as processors, and more threads wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Graphs of models are millions of objects that live long: looking through them again and again takes a tenth of all time.
gc.set_threshold(100_000, 20, 100)

import pytest
from checkpoints import random_checkpoint, small_checkpoint

from foldkv.export.package import export_checkpoint
from foldkv.optimize import chain, history
from foldkv.optimize.build import build_bundles
from foldkv.optimize.passes import row_blocks

ROOT = Path(__file__).parents[1]

#: Test files in the order of how long they take, the longest first, so that processes end together. The real
#: size builds with kernels that the first file compiles. Files that are not listed follow; they take less than the last.
LONGEST_FIRST = (
    "plugins/test_compile.py", "validation/test_bites.py", "test_real_size.py", "plugins/test_kernels.py", "export/test_package.py",
    "test_pipeline.py", "export/test_stitch.py", "optimize/test_build.py", "plugins/test_torch_ops.py", "test_packages.py",
    "export/test_served.py", "test_shell.py", "test_bad_inputs.py", "export/test_parity.py", "runtime/test_session.py",
    "validation/test_validate.py", "export/checkpoint/test_formats.py", "optimize/test_choices.py", "test_cli.py",
    "export/test_memory.py", "test_docs.py",
)  # fmt: skip
#: Cases that `make thorough` has and `make test` leaves out: by file and function, a pattern of their ids. What they show is shown by
#: another case of the same function too, with another size, form or flaw; at least one such case must stay.
THOROUGH = {
    ("validation/test_bites.py", "test_damage_fails_the_gate_that_guards_against_it"):
        "sinks_dropped|rope_of_entries_shifted|topk_halved|layers_swapped",
    ("validation/test_bites.py", "test_damage_to_the_served_profile_fails_its_gates"): "rows_not_quantised",
    ("validation/test_bites.py", "test_ties_excuse_no_wrong_choice"): "entries_off_by_one|topk_halved",
    ("validation/test_controls.py", "test_a_fault_at_one_residue_or_edge_fails_the_sweep_in_its_own_line"):
        "^4-[02]-|^128-(127|1)-",
    ("plugins/test_kernels.py", "test_sparse_attention"): "300.*bfloat16|bfloat16.*300",
    ("plugins/test_kernels.py", "test_index_select_takes_the_best_and_of_equals_the_first"): "^100-|1024$",
    ("plugins/test_kernels.py", "test_dense_attention"): "bfloat16",
    ("plugins/test_experts.py", "test_few_and_many_pairs_agree"): "Experts$|Fp8",
    ("plugins/test_experts.py", "test_a_token_does_not_depend_on_its_neighbours_and_runs_agree"): "Experts-|Fp8-",
    ("plugins/test_experts.py", "test_tokens_and_choices"): "Scaled|Experts-",
    ("plugins/test_experts.py", "test_sizes_at_the_edge_of_tiles_and_blocks"): "Scaled",
    ("plugins/test_sublayer_kernels.py", "test_what_happens_before_a_sublayer"): "4-330|4-128",
    ("plugins/test_sublayer_kernels.py", "test_routing_by_score"): "384-8.*bfloat16|256-6.*float32$",
    ("plugins/test_sublayer_kernels.py", "test_products_are_float32"): "89|120",
    ("plugins/test_block_linear.py", "test_a_token_does_not_depend_on_the_others_nor_on_their_number"): "rows=200|rows=192",
    ("optimize/test_expert_engines.py", "test_experts_are_plugin_layers_that_alone_read_their_weights"): "plain",
    ("optimize/test_choices.py", "test_a_layout_is_kept_exactly_where_injection_and_packing_take_it"):
        "a100|rtx3090|h200|b300|dgx-spark",
    ("runtime/test_chain_memory.py", "test_packed_rows_and_weights_as_stored_give_what_they_give_on_the_cpu"): "not placed",
    ("export/test_package.py", "test_every_form_of_weights_is_exported_by_one_path_and_computes_what_pytorch_does"):
        "mixed|float16|stacked|float32",
    ("export/test_stitch.py", "test_onnx_gives_the_logits_of_transformers"): "one_head_one_group_two_streams|sliding_only_no_hash",
    ("export/test_stitch.py", "test_looking_at_more_rows_than_needed_changes_nothing"): "one_head_one_group_two_streams",
    ("export/test_flat.py", "test_plain_onnx_runtime_computes_what_the_segments_do"): "plain",
    ("plugins/test_tensorrt.py", "test_enqueue_computes_the_operator"): "-1$",
    ("plugins/test_cuda.py", "test_every_operator_through_the_launcher"): "Scaled.*-prefill|Experts-dense-prefill|index_fp8",
    ("test_packages.py", "test_a_missing_package_is_exit_3_with_the_line_that_installs_it"): "jinja2_1|build TensorRT",
    ("test_shell.py", "test_an_interrupted_build_takes_its_child_and_its_threads_along"): "process",
}  # fmt: skip
#: Who asks for one of these waits for an export.
_EXPORTS = {"tiny_graph", "served_graph", "released_graph", "large_bundle"}
#: Seconds of processor time, those of child processes included, that a test without the mark "slow" may take. It should take
#: less than a tenth; the rest is for machines that are slow or busy, so that only a test of another kind fails.
_QUICK_SECONDS = 30


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make thorough` asks for."""
    parser.addoption("--thorough", action="store_true", help="run all cases, also those that repeat what others show")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, mark tests that wait for an export as slow, and leave out what only `make thorough` runs."""
    _leave_out(config, items)
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    missing = [str(path) for path in places if not path.exists()]
    assert not missing, f"LONGEST_FIRST in tests/conftest.py names files that do not exist: {missing}"
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        if _EXPORTS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_function: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        by_function.setdefault((file, getattr(item, "originalname", item.name)), []).append(item)
    whole = not any("::" in str(arg) for arg in config.args)
    dropped = set[pytest.Item]()
    for key in THOROUGH.keys() & by_function.keys():
        found = [item for item in by_function[key] if re.search(THOROUGH[key], item.callspec.id)]
        assert not whole or found, f"THOROUGH in tests/conftest.py: no case of {key} has such a name"
        assert not whole or len(found) < len(by_function[key]), f"THOROUGH in tests/conftest.py leaves no case of {key}"
        if whole and not config.getoption("--thorough"):
            dropped.update(found)
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test without the mark "slow" that takes far longer than such tests do is an error."""
    before = sum(os.times()[:4])
    yield
    took = sum(os.times()[:4]) - before
    if took > _QUICK_SECONDS and item.get_closest_marker("slow") is None:
        pytest.fail(f"it took {took:.0f} s of processor time: mark it with pytest.mark.slow, or make it quicker")


@pytest.fixture(scope="session", autouse=True)
def own_history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of tests are none to estimate by: they are recorded elsewhere than those of the machine's user."""
    file = tmp_path_factory.mktemp("history") / "history.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "history_file", lambda: file)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    return ROOT / "examples" / "tiny-v4"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same in all of its processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder below that of the run
        folder = folder.parent
    (folder / "shared").mkdir(exist_ok=True)
    return folder / "shared"


def made_once(out: Path, make: Callable[[Path], object]) -> Path:
    """The folder ``out``, made by whichever process comes first: ``make`` writes it beside its place, then it is moved there."""
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            make(out.with_suffix(".part"))
            out.with_suffix(".part").rename(out)
    return out


def exported(checkpoint: Path, out: Path, profile: str) -> Path:
    """The graph package, exported by whichever process comes first."""
    return made_once(out, lambda folder: export_checkpoint(checkpoint, folder, profile=profile))


@pytest.fixture(scope="session")
def tiny_graph(tiny_checkpoint: Path, shared_folder: Path) -> Path:
    return exported(tiny_checkpoint, shared_folder / "graph", "hf")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_graph: Path, shared_folder: Path) -> Path:
    report = build_bundles(tiny_graph, shared_folder / "bundles", ["cpu"])
    assert report.exit_code == 0
    return report.results[0].folder


@pytest.fixture(scope="session")
def tiny_report(tiny_bundle: Path, tiny_checkpoint: Path, shared_folder: Path) -> Path:
    """A small report of ``tiny_bundle`` whose gates hold. A test that changes it takes a copy."""
    from foldkv.validation.settings import Plan
    from foldkv.validation.validate import validate

    plan = Plan(texts=1, text_tokens=128, distances=(16, 32), cases_per_distance=5)
    text = shared_folder / "tiny-report-text.txt"
    return made_once(
        shared_folder / "tiny-report",
        lambda out: (
            text.write_text("It is a text of some kinds.\n" * 12, encoding="utf-8"),
            validate(tiny_bundle, tiny_checkpoint, out, plan=plan, text=text, gates={"kl-mean": 1e-3}),
        ),
    )


@pytest.fixture(scope="session")
def served_graph(tiny_checkpoint: Path, shared_folder: Path) -> Path:
    return exported(tiny_checkpoint, shared_folder / "served-graph", "served")


@pytest.fixture(scope="session")
def served_bundles(served_graph: Path, shared_folder: Path) -> dict[str, Path]:
    """Bundles of the served graph for the cpu, by layout."""
    folder, bundles = shared_folder / "served-bundles", {}
    for layout in ("dense", "fp8+fp4"):
        report = build_bundles(served_graph, folder / layout, ["cpu"], layout=layout)
        assert report.exit_code == 0
        bundles[layout] = report.results[0].folder
    return bundles


@pytest.fixture(scope="session")
def quick_checkpoint(tiny_checkpoint: Path, shared_folder: Path) -> Path:
    """A checkpoint with random weights and one layer of tiny-v4, which a test that exports for itself traces in half of the time."""

    def make(out: Path) -> None:
        config = json.loads((tiny_checkpoint / "config.json").read_text()) | {
            "num_hidden_layers": 1, "layer_types": ["compressed_sparse_attention"], "mlp_layer_types": ["moe"],
        }  # fmt: skip
        random_checkpoint(config, out, "plain")
        (out / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())

    return made_once(shared_folder / "quick-checkpoint", make)


@pytest.fixture(scope="session")
def micro_checkpoint(tiny_checkpoint: Path, shared_folder: Path) -> Path:
    """Three narrow layers with random weights, one of each kind, for stand-ins that execute."""
    from executable import write_micro_checkpoint

    return made_once(shared_folder / "micro-checkpoint", lambda out: write_micro_checkpoint(tiny_checkpoint, out))


@pytest.fixture(scope="session")
def micro_graph(micro_checkpoint: Path, shared_folder: Path) -> Path:
    return exported(micro_checkpoint, shared_folder / "micro-graph", "hf")


@pytest.fixture(scope="session")
def released_checkpoint(tiny_checkpoint: Path, shared_folder: Path) -> Callable[[str], Path]:
    """Gives the trained model in the released format: "instruct" or "base", see ``small_checkpoint``."""
    return lambda form: made_once(
        shared_folder / f"released-{form}", lambda out: small_checkpoint(tiny_checkpoint, out, form)
    )


@pytest.fixture(scope="session")
def released_graph(released_checkpoint: Callable[[str], Path], shared_folder: Path) -> Callable[[str], Path]:
    """Gives the graph package, with its weights in float32, of a form of :func:`released_checkpoint`."""
    return lambda form: exported(released_checkpoint(form), shared_folder / f"released-graph-{form}", "hf")


@pytest.fixture(scope="session")
def large_bundle(released_graph: Callable[[str], Path], shared_folder: Path) -> Path:
    """The trained model in the released formats, built as a large one, with blocks of at most 9 rows of 64 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "SMALL", 0)
        patch.setattr(row_blocks, "BLOCK_BYTES", 4 * 64 * 9)
        [result] = build_bundles(released_graph("instruct"), shared_folder / "large", ["cpu"]).results
    assert result.exit_code == 0, result.reason
    return result.folder
