"""A report on a served bundle of quantised weights says how far deployments are from it, W8A8 among them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import small_checkpoint

from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.runtime.model import Model
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.cases import load_text, text_windows
from foldkv.validation.deployments import BOTH, ROWS, W8A8
from foldkv.validation.runners import OracleRunner, SessionRunner
from foldkv.validation.settings import Plan
from foldkv.validation.validate import validate


@pytest.mark.slow
def test_the_report_has_each_deployments_distance_from_the_bundle(quick_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(quick_checkpoint, tmp_path / "checkpoint", "instruct")
    export_checkpoint(checkpoint, tmp_path / "graph", profile="served")
    [built] = build_bundles(tmp_path / "graph", tmp_path / "bundles", ["cpu"], layout="fp8+fp4").results
    plan = Plan(texts=2, text_tokens=64, distances=(16,), cases_per_distance=1, cases_per_kind=0, sweep_cases=0)
    text = Path(__file__).parents[2] / "LICENSE"
    validate(built.folder, checkpoint, tmp_path / "report", plan=plan, text=text, threads=1)
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {row["name"]: row for row in content["deployments"]}
    assert list(found) == [ROWS, W8A8, BOTH] and not any(row["lack"] for row in found.values())

    oracle, tokenizer = OracleRunner(checkpoint), Tokenizer(checkpoint / "tokenizer.json")
    words = tokenizer.encode(load_text(text).words)
    windows = text_windows(words, plan.text_tokens, plan.texts, seed=plan.seed)
    with Model(built.folder, threads=1) as model, SessionRunner(model, context=plan.longest()) as subject:
        ours = [_log_softmax(subject.logits(tokens)) for tokens in windows]
    for name, row in found.items():
        apart = []
        for tokens, one in zip(windows, ours, strict=True):
            other = _log_softmax(oracle.read(tokens, deployment=name).logits)
            apart.append(
                (np.exp(other) * (other - one)).sum(axis=1)[:-1]
            )  # the last token predicts nothing of the text
        assert row["kl_mean"] == pytest.approx(np.concatenate(apart).mean(), rel=1e-4)
        assert row["kl_max"] == pytest.approx(np.concatenate(apart).max(), rel=1e-3)
    assert found[W8A8]["kl_mean"] > 3 * content["metrics"]["oracle_kl_mean"], "it is another computation"
    page = (tmp_path / "report" / "report.html").read_text()
    assert "W8A8" in page and "1x128 with ue8m0 scales" in page


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
