"""What can be seen inside a bundle: streams after every layer, rows of the state, and the entries that indexers choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.runtime import Model, Session, Tokenizer
from foldkv.runtime.backend import Observed
from foldkv.validation.divergence import token_errors
from foldkv.validation.inside import GraphChoices, index_keys
from foldkv.validation.runners import OracleRunner, SessionRunner, TransformersRunner
from foldkv.validation.selection import as_entries


def test_an_observer_sees_every_layer_of_every_chunk_and_changes_nothing(tiny_bundle: Path) -> None:
    seen: list[tuple[int | None, tuple[int, ...]]] = []
    streams: dict[int | None, list[np.ndarray]] = {}

    def keep(one: Observed) -> None:
        assert one.slot == 0 and not one.more
        seen.append((one.layer, one.streams.shape))
        streams.setdefault(one.layer, []).append(one.streams[0].copy())

    tokens = list(range(40, 53))
    with Session(tiny_bundle, context=64, chunk=8) as session:
        plain = session.prefill([tokens])
        after = session.decode([70])
        session.reset()
        with session.observed(keep):
            np.testing.assert_array_equal(session.prefill([tokens]), plain)
        np.testing.assert_array_equal(session.decode([70]), after)
        rows = session.state_rows()
        assert rows.keys() == {tensor.name for tensor in session.bundle.state.tensors}
        assert len(rows["1.entries"]) == 4, "rows in use after 14 tokens"
        session.reset()
        with session.observed(keep):
            session.prefill([tokens[:8]])
    layers = [None, 0, 1, 2, 3]
    assert [layer for layer, _ in seen] == layers * 3, "not the one that nobody observed"
    assert [shape[1] for _, shape in seen[::5]] == [8, 5, 8]
    for first, _, again in streams.values():
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("layout", ["hf", "fp8+fp4"])
def test_what_an_indexer_chose_follows_from_streams_and_index_rows(
    layout: str, tiny_bundle: Path, served_bundles: dict[str, Path], tiny_checkpoint: Path
) -> None:
    """Recomputed as for engines, on bundles that also say it."""
    bundle = tiny_bundle if layout == "hf" else served_bundles[layout]
    spec = Checkpoint(tiny_checkpoint).spec
    layers = list(spec.indexed_ratios)
    with Model(bundle, threads=1) as model, SessionRunner(model, context=160) as subject:
        words = (Path(__file__).parents[2] / "LICENSE").read_text()[:160]
        tokens = Tokenizer.from_bundle(model.bundle).encode(words)[:160]
        look = subject.look(tokens)
        np.testing.assert_array_equal(look.logits, subject.logits(tokens))
        assert model.chain is not None
        inside = GraphChoices(model.chain, layers)
        told = inside.chosen(tokens)
        inside.close()
        keys = index_keys(model.bundle, spec, look.rows, len(tokens))
    assert keys.keys() == told.keys() == set(layers)
    reference = TransformersRunner(tiny_checkpoint) if layout == "hf" else OracleRunner(tiny_checkpoint)
    alone = reference.alone(tokens, look.streams, keys)
    for layer in layers:
        same = [set(a[a >= 0]) == set(b[b >= 0]) for a, b in zip(told[layer], alone.chosen[layer], strict=True)]
        # Scores that tie to the last bit or nearly so may fall either way.
        assert np.mean(same) > 0.95, layer
        swapped = reference.alone(tokens, look.streams, {layer: -keys[layer]}).chosen[layer]
        assert any(set(a) != set(b) for a, b in zip(swapped, alone.chosen[layer], strict=True)), "rows are used"
    typical = [float(np.median(token_errors(*both))) for both in zip(alone.streams, look.streams, strict=True)]
    assert len(typical) == 4 and max(typical) < 1e-4, "each layer alone is right"


def test_entries_of_a_mask() -> None:
    mask = np.array([[False, True, True], [False, False, False], [True, False, False]])
    assert as_entries(mask).tolist() == [[1, 2], [-1, -1], [0, -1]]
