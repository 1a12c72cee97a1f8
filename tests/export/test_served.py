"""The profile ``served``: the parts of its oracle against other implementations, and the exported graph against it.

A value next to the border of two codes may be rounded either way by sums taken in another order, and a top-k may swap two
entries of nearly equal scores; both change logits a little. Figures are therefore compared by the share that agrees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from whole import opened, whole_model

from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.geometry import CSA, SLIDING
from foldkv.export.contract.profiles import check_profile
from foldkv.export.contract.state import state_tensors
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.model.decoder import Decoder, new_state
from foldkv.export.model.hadamard import hadamard_matrix
from foldkv.export.model.rope import inverse_frequencies
from foldkv.export.operators.quantize import quantized_fp4, quantized_fp8
from foldkv.export.operators.rope import rope
from foldkv.export.package import export_checkpoint, read_package
from foldkv.export.served import (
    E2M1,
    E4M3,
    OracleRun,
    hadamard,
    quantize_index,
    quantize_row,
    rotate,
    rotation,
    served_forward,
)

LONGEST = 1 << 20


def uneven(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 4, (*shape[:-1], 1), generator=generator)


def test_the_codes_are_those_of_ml_dtypes() -> None:
    e4m3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    e2m1 = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert E4M3.tolist() == e4m3.tolist() and E2M1.tolist() == e2m1.tolist()


def test_quantised_rows_are_those_of_ml_dtypes() -> None:
    values = uneven(300, 96)
    plain = values[:, :64].numpy().astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(plain).max(-1, keepdims=True), np.float32(1e-4)) / 448))
    codes = (plain / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    tail = values[:, 64:].numpy().astype(ml_dtypes.bfloat16).astype(np.float64)
    assert torch.equal(quantize_row(values, 32).double(), torch.from_numpy(np.concatenate((codes, tail), axis=-1)))


def test_the_oracle_and_the_operators_quantise_alike() -> None:
    values = torch.cat((uneven(500, 128), torch.zeros(1, 128), (uneven(200, 128, seed=1) * 64).round() / 64))
    assert torch.equal(quantize_row(values, 64), quantized_fp8(values, 64))
    rotated = hadamard(values)
    assert torch.equal(quantize_index(values), quantized_fp4(rotated))


@pytest.mark.parametrize("width", [1, 2, 32, 128])
def test_the_hadamard_matrix_is_orthonormal_symmetric_and_the_butterfly(width: int) -> None:
    matrix = hadamard_matrix(width)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(width), atol=1e-6)
    assert torch.allclose(torch.eye(width) @ matrix, hadamard(torch.eye(width)), atol=1e-7)


def test_queries_and_keys_that_are_both_rotated_give_the_same_products() -> None:
    q, k = torch.randn(64, 128, dtype=torch.float64), torch.randn(50, 128, dtype=torch.float64)
    assert torch.allclose(hadamard(q) @ hadamard(k).T, q @ k.T, atol=1e-12)
    assert (hadamard(q) @ k.T - q @ k.T).abs().max() > 1


def test_angles_are_float32_to_the_longest_context_and_those_of_the_export() -> None:
    spec = spec_from_file(Path(__file__).parents[1] / "data" / "deepseek-v4-flash.json")
    for kind in (SLIDING, CSA):
        inv_freq = inverse_frequencies(spec, kind)
        positions = torch.cat((torch.arange(0, LONGEST, 997), torch.arange(LONGEST - 5, LONGEST)))
        turn = rotation(positions, inv_freq)
        assert turn.dtype == torch.complex64
        exact = torch.outer(positions.double(), inv_freq.double())
        apart = torch.angle(turn.to(torch.complex128) * torch.polar(torch.ones_like(exact), -exact)).abs()
        # Half a float32 step of an angle below 2**20, which the last position does not reach.
        assert apart.max() <= 2**-5 + 1e-6
        assert apart[-1].max() <= (0.0127 if kind == CSA else 0.0155)
        x = torch.randn(len(positions), 2 * len(inv_freq) + 8)
        ours = rope(x[None, :, None], positions[None], inv_freq, 0)[0, :, 0]
        assert torch.allclose(rotate(x, turn), ours, rtol=0, atol=2e-6)


SERVED: dict[str, dict[str, Any]] = {
    "odd_ratios": {"compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5}},
}
BASE: dict[str, Any] = {"index_head_dim": 32, "head_dim": 24, "partial_rotary_factor": 1 / 3}


@pytest.fixture(scope="module", params=[*SERVED, "trained"])
def case(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint and its served graph."""
    if request.param == "trained":
        return tiny_checkpoint, request.getfixturevalue("served_graph")
    folder = tmp_path_factory.mktemp(request.param)
    make = request.getfixturevalue("make_reference_once")
    make(seed=len(request.param), **BASE, **SERVED[request.param]).save_pretrained(folder)
    return folder, export_checkpoint(folder, tmp_path_factory.mktemp("graph") / "graph", profile="served")


def prompt(folder: Path, count: int, seed: int = 0) -> Tensor:
    if folder.name == "tiny-v4":
        text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
        return torch.tensor(list(text[200 + seed : 200 + seed + count]))
    return torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(seed))


def run_graph(graph: Path, ids: Tensor, splits: list[int], context: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [n, V] and the state of one sequence, unread rows holding NaN."""
    ort = opened(whole_model(graph, graph.with_name("whole")))
    rows = read_package(graph).manifest.state
    state = {
        row["input"]: np.full((1, row["num_rows"] or -(-context // row["ratio"]), row["width"]), np.nan, np.float32)
        for row in rows
    }
    start, out = 0, []
    for size in splits:
        feeds = {
            "input_ids": ids[None, start : start + size].numpy(),
            "positions": np.array([start], np.int32),
            "num_tokens": np.array([size], np.int32),
            "active_context": np.array([start + size]),
            "logit_indices": np.arange(size)[None],
        }
        logits, *after = ort.run(["logits", *(row["output"] for row in rows)], feeds | state)
        state = {row["input"]: value for row, value in zip(rows, after, strict=True)}
        out.append(torch.from_numpy(logits[0]))
        start += size
    return torch.cat(out), {row["name"]: torch.from_numpy(state[row["input"]][0]) for row in rows}


def agreement(actual: Tensor, expected: Tensor) -> float:
    """Share of the values that are equal up to float32 rounding."""
    return float(torch.isclose(actual, expected, rtol=1e-4, atol=1e-4).double().mean())


def oracle(folder: Path, ids: Tensor) -> tuple[Decoder, OracleRun]:
    decoder = decoder_from_checkpoint(Checkpoint(folder), "served")
    with torch.no_grad():
        return decoder, served_forward(decoder, ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "splits", [[150], [1] * 30 + [120], [3, 8, 1, 17, 31, 33, 57]], ids=["whole", "decode", "chunks"]
)
def test_the_graph_computes_what_the_oracle_computes(case: tuple[Path, Path], splits: list[int]) -> None:
    folder, graph = case
    ids = prompt(folder, 150)
    decoder, expected = oracle(folder, ids)
    logits, state = run_graph(graph, ids, splits, 160)
    assert logits.isfinite().all()
    difference = (logits - expected.logits).abs().max(dim=-1).values / expected.logits.std()
    assert float(difference.median()) < 1e-4
    assert float((difference < 0.05).double().mean()) > 0.9
    for tensor in state_tensors(decoder.spec):
        if "carry" in tensor.group:
            continue
        want, have = expected.caches[tensor.name], state[tensor.name]
        if tensor.group == "window":
            kept = torch.arange(max(0, 150 - tensor.capacity(160)), 150)
            want, have = want[kept], have[kept % tensor.capacity(160)]
        else:
            assert len(want) == 150 // (tensor.ratio or 1)
            assert have[len(want) :].isnan().all(), "rows of windows that have not closed are written"
            have = have[: len(want)]
        assert agreement(have, want) > 0.98, tensor.name


@pytest.mark.slow
def test_every_chunk_edge_gives_the_oracles_rows_and_logits(tiny_checkpoint: Path) -> None:
    ids = prompt(tiny_checkpoint, 40)
    decoder, expected = oracle(tiny_checkpoint, ids)
    for split in range(1, 40):
        state, parts = new_state(decoder.spec, 40, 1, fill=float("nan")), []
        for start, end in ((0, split), (split, 40)):
            size = end - start
            with torch.no_grad():
                logits, state = decoder(
                    ids[None, start:end], torch.tensor([start], dtype=torch.int32),
                    torch.tensor([size], dtype=torch.int32), torch.tensor([end]), torch.arange(size)[None], state,
                )  # fmt: skip
            parts.append(logits[0])
        difference = (torch.cat(parts) - expected.logits).abs().max(dim=-1).values
        assert float(difference.median()) < 1e-4 and float(difference.max()) < 0.5, split


@pytest.mark.slow
def test_served_is_another_computation_than_hf(tiny_checkpoint: Path) -> None:
    """The comparison with the oracle would mean little if the profile changed nothing."""
    ids = prompt(tiny_checkpoint, 150)
    _, expected = oracle(tiny_checkpoint, ids)
    decoder = decoder_from_checkpoint(Checkpoint(tiny_checkpoint))
    with torch.no_grad():
        logits, _ = decoder(
            ids[None], torch.zeros(1, dtype=torch.int32), torch.tensor([150], dtype=torch.int32), torch.tensor([150]),
            torch.arange(150)[None], new_state(decoder.spec, 150),
        )  # fmt: skip
    difference = (logits[0] - expected.logits).abs().max(dim=-1).values
    assert 1e-3 < float(difference.median()) < 1


def test_models_without_packed_rows_have_no_served_profile(make_reference: Any, tmp_path: Path) -> None:
    make_reference(index_head_dim=48).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(InputError, match="a Hadamard matrix needs a power of two"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "graph", profile="served")
    assert not (tmp_path / "graph").exists()
    with pytest.raises(InputError, match="profile 'sreved' is not known"):
        check_profile("sreved", spec_from_file(tmp_path / "checkpoint"))
