"""Sessions: parity with transformers, independence of chunks and neighbours, snapshots, limits."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from foldkv.artifact import read_manifest
from foldkv.errors import CapacityError, FoldkvError, InputError
from foldkv.export.spec import ModelSpec
from foldkv.export.state import state_tensors, total_bytes
from foldkv.runtime.sampling import Sampling
from foldkv.runtime.session import Session

PROMPT = list(b"def scale(values, factor):\n    return [value * factor for value in values]\n\n\ndef ")
OTHER = list(b"Licensed under the Apache License, Version 2.0")


def test_greedy_text_is_that_of_transformers_for_500_tokens(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """By induction: if every token is the likeliest one after all before it, greedy decoding writes these tokens."""
    with Session(tiny_bundle, context=640) as session:
        new = session.generate([PROMPT], max_new_tokens=500, stop_tokens=[])[0]
    assert len(new) == 500
    model = DeepseekV4ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([PROMPT + new[:-1]]), use_cache=False).logits[0]
    assert logits[len(PROMPT) - 1 :].argmax(-1).tolist() == new


def test_a_text_ends_where_the_bundle_says(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without being told to: any of the ids that the bundle names ends a text, and is no part of it."""
    with Session(tiny_bundle, context=128) as session:
        whole = session.generate([OTHER], max_new_tokens=40, stop_tokens=[])[0]
    end = next(token for place, token in enumerate(whole) if place and token not in whole[:place])
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["eos_token_ids"] = [0, end]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with Session(bundle, context=128) as session:
        assert session.generate([OTHER], max_new_tokens=40)[0] == whole[: whole.index(end)] != []


@pytest.mark.parametrize("chunk", [1, 3, 4, 31, 33, 256])
def test_the_size_of_chunks_does_not_matter(tiny_bundle: Path, chunk: int) -> None:
    text = (PROMPT * 3)[:170]
    with Session(tiny_bundle, context=256, chunk=256) as whole, Session(tiny_bundle, context=256, chunk=chunk) as parts:
        np.testing.assert_allclose(
            parts.prefill([text], logits="all")[0], whole.prefill([text], logits="all")[0], atol=1e-4
        )
        np.testing.assert_allclose(parts.decode([65]), whole.decode([65]), atol=1e-4)


def test_a_sequence_does_not_depend_on_its_neighbours(tiny_bundle: Path) -> None:
    prompts = [PROMPT, OTHER, PROMPT[:5]]
    with Session(tiny_bundle, context=256, batch=3) as session:
        together = session.generate(prompts, max_new_tokens=60, stop_tokens=[])
    with Session(tiny_bundle, context=256) as session:
        alone = [session.generate([prompt], max_new_tokens=60, stop_tokens=[])[0] for prompt in prompts]
    assert together == alone


def test_sampled_tokens_do_not_depend_on_the_slot(tiny_bundle: Path) -> None:
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=7)
    with Session(tiny_bundle, context=256, batch=2) as session:
        first = session.generate([PROMPT, OTHER], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[4, 9])
        second = session.generate(
            [OTHER, PROMPT], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[9, 4]
        )
        again = session.generate([OTHER], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[9])
        other = session.generate([OTHER], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[10])
    assert first == second[::-1]
    assert again[0] == second[0] != other[0]


def test_a_snapshot_restored_gives_the_same_bits(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256, batch=2) as session:
        session.prefill([PROMPT, OTHER])
        snapshot = session.snapshot()
        first = [session.decode([65 + step, 97 + step]) for step in range(40)]
        session.restore(snapshot)
        assert session.positions.tolist() == [len(PROMPT), len(OTHER)]
        second = [session.decode([65 + step, 97 + step]) for step in range(40)]
        with Session(tiny_bundle, context=256, batch=2) as fresh:
            fresh.restore(snapshot)
            third = [fresh.decode([65 + step, 97 + step]) for step in range(40)]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_a_snapshot_of_another_shape_is_refused_and_changes_nothing(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session, Session(tiny_bundle, context=320) as other:
        session.prefill([PROMPT])
        other.prefill([OTHER])
        with pytest.raises(InputError, match="context 320"):
            session.restore(other.snapshot())
        assert session.positions.tolist() == [len(PROMPT)]


def test_exceeding_the_context_is_refused_before_the_state_is_touched(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=96) as session, Session(tiny_bundle, context=512) as large:
        session.prefill([PROMPT])
        before = session.snapshot()
        room = 96 - len(PROMPT)
        with pytest.raises(CapacityError, match=r"exceed the context of 96\. Nothing was changed"):
            session.prefill([[65] * (room + 1)])
        with pytest.raises(CapacityError):
            session.stream([PROMPT], max_new_tokens=room + 2)
        after = session.snapshot()
        assert after.positions == before.positions
        for left, right in zip(before.rows, after.rows, strict=True):
            np.testing.assert_array_equal(left, right)
        large.prefill([PROMPT])
        np.testing.assert_allclose(session.prefill([[65] * room]), large.prefill([[65] * room]), atol=1e-4)
        with pytest.raises(CapacityError):
            session.decode([65])


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (333, 1), (4096, 3)])
def test_the_bytes_of_the_state_are_the_planned_ones(
    tiny_bundle: Path, tiny_checkpoint: Path, context: int, batch: int
) -> None:
    planned = total_bytes(state_tensors(ModelSpec.from_file(tiny_checkpoint)), context, batch)
    with Session(tiny_bundle, context=context, batch=batch) as session:
        assert session.state_bytes == planned


def test_a_reset_session_is_a_new_one(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256, batch=2) as session, Session(tiny_bundle, context=256, batch=2) as fresh:
        session.prefill([PROMPT * 2, OTHER])
        session.reset()
        np.testing.assert_array_equal(session.prefill([OTHER, PROMPT]), fresh.prefill([OTHER, PROMPT]))


def test_resetting_one_slot_leaves_the_other(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256, batch=2) as session, Session(tiny_bundle, context=256, batch=2) as other:
        session.prefill([PROMPT, OTHER])
        session.reset([0])
        assert session.positions.tolist() == [0, len(OTHER)]
        session.forward([PROMPT[:9], []])
        other.prefill([PROMPT[:9], OTHER])
        np.testing.assert_allclose(session.decode([65, 66]), other.decode([65, 66]), atol=1e-5)


def test_streams_give_what_generate_gives_and_stop_at_stop_tokens(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session:
        tokens = session.generate([PROMPT], max_new_tokens=40, stop_tokens=[])[0]
        assert [token for _, token in session.stream([PROMPT], max_new_tokens=40, stop_tokens=[])] == tokens
        stop = tokens[-1]
        stopped = session.generate([PROMPT], max_new_tokens=40, stop_tokens=[stop])[0]
        assert stopped == tokens[: tokens.index(stop)]


def test_a_stream_notices_that_the_session_was_used(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session:
        stream = session.stream([PROMPT], max_new_tokens=5, stop_tokens=[])
        next(stream)
        session.reset()
        with pytest.raises(InputError, match="was used while a stream was open"):
            next(stream)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.generate([[]], max_new_tokens=3), "prompt 0 is empty"),
        (lambda s: s.generate([PROMPT], max_new_tokens=0), "max_new_tokens must be an integer of 1 or more"),
        (lambda s: s.generate([PROMPT, PROMPT], max_new_tokens=1), "got 2 prompts"),
        (lambda s: s.prefill([[258]]), "token 0 has the id 258; the vocabulary has the ids 0 to 257"),
        (lambda s: s.prefill([[-1]]), "has the id -1"),
        (lambda s: s.prefill([[1.5]]), "expected a sequence of integer token ids"),
        (lambda s: s.prefill(["text"]), "expected a sequence of integer token ids"),
        (lambda s: s.forward([[1], [2]]), "got tokens for 2 slots"),
        (lambda s: s.forward([[1]], logits="some"), "logits must be"),
        (lambda s: s.reset([3]), "slots must be among 0 to 0"),
        (lambda s: s.generate([PROMPT], max_new_tokens=1, requests=[-1]), "requests must be"),
    ],
)
def test_a_wrong_argument_is_one_error_and_changes_nothing(
    tiny_bundle: Path, call: Callable[[Session], object], message: str
) -> None:
    with Session(tiny_bundle, context=128) as session:
        session.prefill([OTHER])
        with pytest.raises(InputError, match=message):
            call(session)
        assert session.positions.tolist() == [len(OTHER)]


@pytest.mark.parametrize(
    "options", [{"context": 0}, {"context": 1 << 30}, {"batch": 0}, {"chunk": True}, {"threads": -1}]
)
def test_a_wrong_option_is_refused(tiny_bundle: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Session(tiny_bundle, **options)


def test_a_closed_session_says_so(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle, context=64)
    session.close()
    session.close()
    with pytest.raises(FoldkvError, match="closed"):
        session.decode([1])


def test_a_decode_step_does_not_copy_the_caches(tiny_bundle: Path) -> None:
    """At the same position, a state of 200 MB costs the time of one of 0.3 MB; copying it would take several steps' time."""
    with Session(tiny_bundle, context=1024) as small, Session(tiny_bundle, context=1 << 20) as large:
        assert large.state_bytes > 200e6 > 500 * small.state_bytes
        seconds: dict[Session, list[float]] = {small: [], large: []}
        for session in seconds:
            session.prefill([PROMPT])
        for _ in range(30):
            for session, times in seconds.items():
                start = time.perf_counter()
                session.decode([65])
                times.append(time.perf_counter() - start)
        assert statistics.median(seconds[large]) < 2 * statistics.median(seconds[small])


def test_a_service_needs_neither_torch_nor_onnx(tiny_bundle: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from foldkv.runtime.session import Session\n"
        f"Session(Path({str(tiny_bundle)!r}), context=64).generate([[65, 66]], max_new_tokens=3)\n"
        "print([name for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'transformers', 'triton') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_manifest_lists_the_state_that_the_graph_has(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle, kind="foldkv.bundle")
    groups = [row["group"] for row in manifest["state"]]
    assert groups.count("window") == 4 and groups.count("entries") == 3 and groups.count("index_entries") == 2
