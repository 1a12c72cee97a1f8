"""What deployed systems round beside the profile ``served``, in its oracle, against formulas in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.model.decoder import Decoder
from foldkv.export.served import (
    Asked,
    Rounding,
    quantised_modules,
    quantize_activation,
    rotate,
    rotation,
    served_forward,
)
from foldkv.validation.deployments import BOTH, ROWS, W8A8
from foldkv.validation.metrics import compare_logits
from foldkv.validation.runners import OracleRunner

Array = np.ndarray[Any, np.dtype[np.float64]]


def e4m3(x: Any, tile: int) -> Array:
    """The released act_quant: amax of a tile, at least 1e-4, over 448; the power of two not below; codes by ml_dtypes."""
    rows = np.asarray(x, np.float32)
    out = np.empty(rows.shape, np.float64)
    for first in range(0, rows.shape[-1], tile):
        part = rows[..., first : first + tile].astype(np.float64)
        largest = np.maximum(np.abs(part).max(-1, keepdims=True), np.float64(np.float32(1e-4)))
        scale = 2.0 ** np.ceil(np.log2(largest / 448))
        out[..., first : first + tile] = (part / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return out


@pytest.fixture(scope="module")
def released(released_checkpoint: Callable[[str], Path]) -> tuple[Checkpoint, Decoder]:
    checkpoint = Checkpoint(released_checkpoint("instruct"))
    return checkpoint, decoder_from_checkpoint(checkpoint)


TOKENS = torch.tensor(list(b"k42;Q07;a11;k42;Z99;licence "))


def recorded(decoder: Decoder, names: list[str], rounding: Rounding) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs as given and outputs of modules, in a run of the oracle."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name in names:
        module = decoder.get_submodule(name)
        # Runs before the oracle's own hook, so that it sees what comes in.
        hooks.append(
            module.register_forward_hook(
                lambda _, given, out, n=name: found.update({n: (given[0].clone(), out.clone())})
            )
        )
    try:
        with torch.no_grad():
            served_forward(decoder, TOKENS, rounding=rounding)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("width", [128, 512, 96, 200])
def test_activations_are_those_of_ml_dtypes(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(40, width, generator=generator) * 10.0 ** torch.randint(-6, 4, (40, 1), generator=generator)
    x[3] = 0
    assert torch.equal(quantize_activation(x).double(), torch.from_numpy(e4m3(x, 128)))


def test_what_is_quantised_follows_from_how_weights_are_stored(
    released: tuple[Checkpoint, Decoder], tiny_checkpoint: Path
) -> None:
    assert quantised_modules(Checkpoint(tiny_checkpoint)) == [], "bfloat16 weights take activations as they are"
    names = quantised_modules(released[0])
    inner = [f"ffn.shared_experts.w{part}" for part in (1, 2, 3)] + ["ffn.experts"]
    inner += [f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_b")]
    expected = {f"layers.{layer}.{name}" for layer in range(4) for name in inner}
    assert set(names) == expected | {f"layers.{layer}.attn.indexer.wq_b" for layer in (1, 3)}
    assert len(names) == len(set(names))


def test_every_quantised_linear_multiplies_quantised_inputs(released: tuple[Checkpoint, Decoder]) -> None:
    checkpoint, decoder = released
    names = [name for name in quantised_modules(checkpoint) if not name.endswith(".experts")]
    found = recorded(decoder, names, Rounding(activations=quantised_modules(checkpoint)))
    for name in names:
        given, out = found[name]
        weight = decoder.get_submodule(name).weight.double().numpy()
        # A hook sees what the oracle's own has made of the input: values that e4m3 already has.
        rounded = e4m3(given, 128)
        assert np.array_equal(rounded, given.double().numpy()), name
        assert np.allclose(out.numpy(), rounded @ weight.T, rtol=1e-4, atol=1e-4), name
    before = decoder.get_submodule(names[0])._forward_pre_hooks
    assert not before, "nothing of it stays"
    plain = recorded(decoder, names[:1], Rounding())[names[0]][0]
    assert not np.array_equal(e4m3(plain, 128), plain.double().numpy())


def test_experts_quantise_both_inputs_and_weight_the_second(
    released: tuple[Checkpoint, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decoder = released
    layer = decoder.layers[1]
    mixture: Any = layer.ffn  # type: ignore[union-attr]
    kept: dict[str, Tensor] = {}
    hooks = [
        mixture.gate.register_forward_hook(
            lambda _, given, out: kept.update(x=given[0], chosen=out[0], weights=out[1])
        ),
    ]
    whole: list[Tensor] = []
    original = "layers.1.ffn.experts"
    real = Asked.answer

    def spied(asked: Asked, expert: int, w13: Tensor, w2: Tensor) -> None:
        real(asked, expert, w13, w2)
        if w13.data_ptr() == mixture.experts.w13[expert].data_ptr():
            assert asked.quantised
            whole.append(asked.answers)

    monkeypatch.setattr(Asked, "answer", spied)
    with torch.no_grad():
        served_forward(decoder, TOKENS, rounding=Rounding(activations=[original]))
    for hook in hooks:
        hook.remove()
    x, limit = e4m3(kept["x"], 128), mixture.limit
    w13, w2 = mixture.experts.w13.double().numpy(), mixture.experts.w2.double().numpy()
    for token in (0, 5, len(TOKENS) - 1):
        total = np.zeros(x.shape[-1])
        for expert, weight in zip(kept["chosen"][token].tolist(), kept["weights"][token].tolist(), strict=True):
            gate, up = np.split(w13[expert] @ x[token], 2)
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            hidden = (gate / (1 + np.exp(-gate)) * up).astype(np.float32) * np.float32(weight)
            total += w2[expert] @ e4m3(hidden, 128)
        actual = whole[-1][token].sum(dim=0).numpy()
        # A hidden value at the border of two codes may go either way: one of 128 moves the sum by a few thousandths.
        assert np.abs(actual - total).max() < 2e-2 * np.abs(total).max()
        assert np.median(np.abs(actual - total)) < 2e-3 * np.abs(total).max()


def test_rows_are_rounded_to_bfloat16_first(released: tuple[Checkpoint, Decoder]) -> None:
    _, decoder = released
    spec, attention = decoder.spec, decoder.layers[0].attn  # type: ignore[union-attr]
    kept: list[Tensor] = []
    hook = attention.kv_norm.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        with_it, without = (served_forward(decoder, TOKENS, rounding=Rounding(rows=rows)) for rows in (True, False))
    hook.remove()
    rows = rotate(kept[0], rotation(torch.arange(len(TOKENS)), attention.inv_freq)).numpy()
    plain = rows[:, : -spec.rope_dim]
    tail = rows[:, -spec.rope_dim :].astype(ml_dtypes.bfloat16).astype(np.float64)
    for run, first in ((with_it, plain.astype(ml_dtypes.bfloat16).astype(np.float32)), (without, plain)):
        expected = np.concatenate((e4m3(first, 64), tail), axis=-1)
        assert np.array_equal(run.caches["0.window"].double().numpy(), expected)
    assert not torch.equal(with_it.caches["0.window"], without.caches["0.window"])
    assert not torch.equal(with_it.caches["1.entries"], without.caches["1.entries"])


def test_the_oracle_tells_its_deployments_apart(
    released_checkpoint: Callable[[str], Path], tiny_checkpoint: Path
) -> None:
    assert OracleRunner(tiny_checkpoint).deployments == (ROWS,)
    oracle = OracleRunner(released_checkpoint("instruct"))
    assert oracle.deployments == (ROWS, W8A8, BOTH)
    tokens = TOKENS.tolist()
    plain = oracle.read(tokens).logits
    kl = {
        name: compare_logits(oracle.read(tokens, deployment=name).logits, plain, TOKENS.numpy()).kl.mean()
        for name in oracle.deployments
    }
    assert 0 < kl[ROWS] < kl[W8A8] < 0.1 and kl[BOTH] not in (kl[ROWS], kl[W8A8])
