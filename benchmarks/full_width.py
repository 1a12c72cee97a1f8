"""Layers of V4-Flash at full width on the CPU, against transformers' layers with the same weights.

``python benchmarks/full_width.py export/configs/deepseek-v4-flash.json -o benchmarks/results/full-width-cpu.json``. The model has three
layers: CSA with experts looked up by token, HCA and CSA with experts chosen by score. Everything in them has the released sizes
and formats; weights are random. Only the vocabulary is smaller, which no layer sees. Needs 25 GB of disk and 10 GB of memory.

The cpu bundle is fed a prompt in chunks and then single tokens, through its compressed caches. The reference reads all of it at
once, layer by layer (foldkv/validation/layered.py), with transformers' own cache between chunks. The streams after every layer are
compared: the largest difference of a token over the root mean square of the reference's streams there.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import foldkv
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.runtime.backend import Observed
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.chain_executor import ChainExecutor
from foldkv.validation.jobs import Job
from foldkv.validation.layered import LayeredReference, edges_of, read_layered

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

#: Of the three layers: CSA, HCA, CSA; the first looks its experts up.
RATIOS, HASHED = [4, 128, 4], 1
VOCABULARY = 4096
KINDS = ("CSA, experts by token", "HCA, experts by score", "CSA, experts by score")


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--prompt", default=2300, show_default=True, help="Tokens that are fed in chunks.")
@click.option("--decode", default=64, show_default=True, help="Tokens that are fed one by one.")
@click.option("--chunk", default=256, show_default=True)
@click.option("--experts", type=int, help="Experts of a layer; default: the model's.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for the checkpoint and the bundle; default: one that is removed.",
)
def main(
    config: Path, output: Path, prompt: int, decode: int, chunk: int, experts: int | None, work: Path | None
) -> None:  # fmt: skip
    """Measure and write the results as JSON."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        os.environ["FOLDKV_CACHE"] = str((work or Path(folder)) / "cache")
        row = measure(config, work or Path(folder), prompt, decode, chunk, experts)
    content = {
        "what": "three layers of full width with random weights, cpu bundle against transformers layer by layer; one run",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers")} | {"foldkv": foldkv.__version__},
        "model": config.stem,
        **row,
    }  # fmt: skip
    output.write_text(json.dumps(content, indent=2) + "\n")


def measure(config: Path, work: Path, prompt: int, decode: int, chunk: int, experts: int | None) -> dict[str, Any]:
    """Everything that the results have; files are made in ``work``, unless they are there."""
    checkpoint = _checkpoint(config, work / "checkpoint", experts)
    graph, start = work / "graph", time.monotonic()
    if not graph.exists():
        export_checkpoint(checkpoint, graph)
        [built] = build_bundles(graph, work / "bundles", ["cpu"]).results
        assert built.reason == "", built.reason
    made = time.monotonic() - start
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, prompt + decode).tolist()
    ours, facts = _subject(work / "bundles" / "cpu", tokens, prompt, chunk)
    start = time.monotonic()
    reference, errors = LayeredReference(Checkpoint(checkpoint)), list[dict[str, Any]]()

    def compare(layer: int, streams: Any) -> None:
        errors.append({"layer": layer, "kind": KINDS[layer], **_difference(ours[layer], streams[0].numpy(), prompt)})
        click.echo(json.dumps(errors[-1]))

    read_layered(reference, [Job(tokens, edges=edges_of(chunk, len(tokens)))], observe=compare, progress=click.echo)
    spec = reference.weights.checkpoint.spec
    return {
        "tokens": {"prompt": prompt, "decoded": decode, "chunk": chunk},
        "experts": spec.num_experts,
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "seconds_to_export_and_build": round(made, 1),
        "bundle": facts,
        "reference": {"name": reference.name, "seconds": round(time.monotonic() - start, 1)},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "layers": errors,
    }


def _checkpoint(config: Path, out: Path, experts: int | None) -> Path:
    from checkpoints import random_checkpoint

    if not out.exists():
        content = json.loads(config.read_text())
        content |= {
            "num_hidden_layers": len(RATIOS), "compress_ratios": RATIOS, "num_hash_layers": HASHED,
            "vocab_size": VOCABULARY, "num_nextn_predict_layers": 0,
        }  # fmt: skip
        content |= {"n_routed_experts": experts} if experts else {}
        content.pop("quantization_config", None)
        random_checkpoint(content, out.with_suffix(".part"), "instruct")
        out.with_suffix(".part").rename(out)
    return out


def _subject(bundle: Path, tokens: list[int], prompt: int, chunk: int) -> tuple[list[Any], dict[str, Any]]:
    """The streams [n, N, C] after every layer, as the bundle computes them, and how long that took."""
    found: list[list[Any]] = [[] for _ in RATIOS]

    def keep(seen: Observed) -> None:
        if seen.layer is not None:
            found[seen.layer].append(seen.streams[0].copy())

    start = time.monotonic()
    model = ChainModel(load_bundle(bundle), matrices="bfloat16", progress=click.echo)
    opened = time.monotonic() - start
    executor, took = ChainExecutor(model, len(tokens), 1), list[tuple[int, float]]()
    edges = [*range(0, prompt, chunk), *range(prompt, len(tokens) + 1)]
    for at, end in itertools.pairwise(edges):
        start = time.monotonic()
        executor.run(
            np.array([tokens[at:end]], np.int64), np.array([at]), np.array([end - at]), end, np.zeros((1, 1), np.int64),
            trim=end - at > 1, observe=keep,
        )  # fmt: skip
        took.append((end - at, time.monotonic() - start))
    executor.close()
    model.close()
    steps = sorted(seconds for size, seconds in took if size == 1)
    chunks = sorted(seconds for size, seconds in took if size == chunk)
    return [np.concatenate(one) for one in found], {
        "seconds_to_open": round(opened, 2),
        "seconds_a_chunk": round(chunks[len(chunks) // 2], 3),
        "seconds_a_step": round(steps[len(steps) // 2], 4),
        "layers": len(RATIOS),
    }


def _difference(found: Any, expected: Any, prompt: int) -> dict[str, float]:
    """Largest and middle difference of a token, for the prompt and for decoded tokens, over the streams' root mean square."""
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    apart = np.abs(found - expected).max(axis=(1, 2)) / scale
    return {
        "rms": scale,
        "prompt_largest": float(apart[:prompt].max()), "prompt_median": float(np.median(apart[:prompt])),
        "decoded_largest": float(apart[prompt:].max()), "decoded_median": float(np.median(apart[prompt:])),
    }  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
