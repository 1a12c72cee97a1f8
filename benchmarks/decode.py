"""Decode latency of a CPU bundle beside transformers' eager decode, as the context grows.

``python benchmarks/decode.py BUNDLE CHECKPOINT -o benchmarks/results/decode-cpu.json``. At every context both
are filled with the same tokens and then take turns: one step of ours, one of theirs, so that noise of the
machine affects both. Medians are quoted; on a shared machine ratios mean more than times.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from transformers import DeepseekV4ForCausalLM
from transformers.cache_utils import DynamicCache

import foldkv
from foldkv.runtime.session import Session


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--contexts", default="1024,4096,16384,65536", show_default=True)
@click.option("--steps", default=25, show_default=True, help="Decode steps measured at each context.")
@click.option("--threads", default=2, show_default=True, help="Processors that each side may use.")
def main(bundle: Path, checkpoint: Path, output: Path, contexts: str, steps: int, threads: int) -> None:
    """Measure and write the results as JSON."""
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    model: Any = DeepseekV4ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = []
    for context in (int(size) for size in contexts.split(",")):
        rows.append(measure(bundle, model, context, steps, threads))
        click.echo(json.dumps(rows[-1]))
    content = {
        "what": "one decode step, float32, batch 1; seconds are medians",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {threads} threads, shared",
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
        | {"foldkv": foldkv.__version__},
        "steps": steps,
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def measure(bundle: Path, model: Any, context: int, steps: int, threads: int) -> dict[str, Any]:
    """Fill both to ``context`` tokens, then take turns decoding."""
    tokens = np.random.default_rng(0).integers(32, 127, context).tolist()
    cache = DynamicCache(config=model.config)
    with Session(bundle, context=context + steps + 8, threads=threads) as session, torch.no_grad():
        start = time.perf_counter()
        session.prefill([tokens])
        ours_prefill = time.perf_counter() - start
        start = time.perf_counter()
        for at in range(0, context, 256):
            model(input_ids=torch.tensor([tokens[at : at + 256]]), past_key_values=cache, logits_to_keep=1)
        theirs_prefill = time.perf_counter() - start
        ours, theirs = [], []
        for step in range(steps + 5):
            start = time.perf_counter()
            logits = session.decode([65])
            middle = time.perf_counter()
            reference = model(input_ids=torch.tensor([[65]]), past_key_values=cache).logits[0, -1]
            end = time.perf_counter()
            if step >= 5:  # the first ones touch memory for the first time
                ours.append(middle - start)
                theirs.append(end - middle)
        error = float(np.abs(logits[0] - reference.numpy()).max())
    return {
        "context": context,
        "foldkv_step_s": statistics.median(ours),
        "transformers_step_s": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "foldkv_prefill_s": ours_prefill,
        "transformers_prefill_s": theirs_prefill,
        "logit_difference": error,
    }


if __name__ == "__main__":
    main()
