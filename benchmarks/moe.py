"""Whole models with 8 to 256 routed experts, six chosen: cpu bundles beside transformers' eager attention, decode and chunks.

``python benchmarks/moe.py -o benchmarks/results/moe-cpu.json``. Every count has a checkpoint of its own in the released
format (e2m1 experts, e4m3 matrices; random weights), and a bundle, which is opened in three ways: "float32" and "bfloat16" have the experts in the
order of QMoE and the matrices in this type, "stored" reads all where it lies (`--no-place`). At each count these and transformers take turns in
one process: one step or chunk of each, with the same tokens; the counts take turns by rounds. Memory is that of a process that holds one of them
only, after as many steps and chunks.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import foldkv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

#: Ways to open the bundle by name.
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"matrices": "float32"},
    "bfloat16": {"matrices": "bfloat16"},
    "stored": {"place": False},
}
_SLIDING, _CSA, _HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
#: A model with layers of all kinds and the released ratios; the number of routed experts is left open.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 4096, "hidden_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 128, "num_key_value_heads": 1, "q_lora_rank": 256,
    "o_groups": 4, "o_lora_rank": 256, "sliding_window": 128, "index_n_heads": 8, "index_head_dim": 64, "index_topk": 64,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 512, "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "max_position_embeddings": 65536,
    "rope_theta": 10000, "compress_rope_theta": 160000, "qk_rope_head_dim": 64, "num_nextn_predict_layers": 0,
    "layer_types": [_SLIDING, _CSA, _HCA, _CSA], "compress_rates": {_CSA: 4, _HCA: 128},
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
_PROMPT, _CHUNK, _CHUNKS, _WARM = 256, 128, 4, 3
Step = Callable[[list[int]], np.ndarray[Any, Any]]


def open_side(side: str, folder: Path, threads: int) -> Step:
    """A function that feeds tokens to one model and returns the logits after the last."""
    if side != "transformers":
        from foldkv.runtime.session import Session

        session = Session(folder / "cpu", context=1024, threads=threads, chunk=_CHUNK, **FORMS[side])
        return lambda tokens: session.prefill([tokens])[0]
    import torch
    import transformers
    from transformers.cache_utils import DynamicCache

    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    loaded: Any = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder / "checkpoint", dtype=torch.float32, attn_implementation="eager"
    )
    model = loaded.float().eval().requires_grad_(False)
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step(tokens: list[int]) -> np.ndarray[Any, Any]:
        for at in range(0, len(tokens), _CHUNK):
            ids = torch.tensor([tokens[at : at + _CHUNK]])
            logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        found: np.ndarray[Any, Any] = logits[0, -1].numpy()
        return found

    return step


def measure(folder: Path, sides: list[str], steps: int, threads: int) -> dict[str, Any]:
    """Decode steps and chunks of all ``sides`` by turns, in this process: medians by side, and memory of the process."""
    random = np.random.default_rng(0)
    prompt = random.integers(2, CONFIG["vocab_size"], _PROMPT).tolist()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    chunks: dict[str, list[float]] = {side: [] for side in sides}
    logits = {}
    models = {side: open_side(side, folder, threads) for side in sides}
    for step in models.values():
        step(prompt)
    for _ in range(_CHUNKS):
        tokens = random.integers(2, CONFIG["vocab_size"], _CHUNK).tolist()
        for side, step in models.items():
            start = time.perf_counter()
            step(tokens)
            chunks[side].append(time.perf_counter() - start)
    for number in range(steps + _WARM):
        token = int(random.integers(2, CONFIG["vocab_size"]))
        for side, step in models.items():
            start = time.perf_counter()
            logits[side] = step([token])
            if number >= _WARM:
                seconds[side].append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()
    resident = {key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 for key in ("VmRSS", "RssAnon", "RssFile")}  # type: ignore[index]
    return {
        "step_seconds": {side: statistics.median(times) for side, times in seconds.items()},
        "chunk_seconds": {side: statistics.median(times) for side, times in chunks.items()},
        "resident_bytes": resident,
        "logit_difference": {
            side: float(np.abs(logits[side] - logits[sides[-1]]).max()) for side in sides[:-1]
        },
        "logit_spread": float(np.std(logits[sides[-1]])),
    }  # fmt: skip


def prepare(folder: Path, experts: int) -> dict[str, Any]:
    """Write the checkpoint and its bundle; returns facts about them."""
    from checkpoints import random_checkpoint

    checkpoint = random_checkpoint(CONFIG | {"n_routed_experts": experts}, folder / "checkpoint")
    facts: dict[str, Any] = {"checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))}
    foldkv_ = [sys.executable, "-m", "foldkv"]
    subprocess.run([*foldkv_, "export", str(checkpoint), "-o", str(folder / "graph")], check=True, capture_output=True)
    command = [*foldkv_, "build", str(folder / "graph"), "-o", str(folder), "--target", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    manifest = json.loads((folder / "cpu" / "manifest.json").read_text())
    facts["bundle_bytes"] = sum(one["bytes"] for one in manifest["files"].values())
    facts["nodes"] = {name: row["optimized"] for name, row in manifest["engine"]["nodes"].items()}
    return facts


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--counts", default="8,64,128,256", show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Processes of every number of experts, by turns.")
@click.option("--threads", default=2, show_default=True, help="Processors that each side may use.")
@click.option("--one", help="FOLDER:SIDE,SIDE: measure these here and print it.")
def main(output: Path | None, counts: str, steps: int, rounds: int, threads: int, one: str | None) -> None:
    """Measure and write the results as JSON."""
    if one is not None:
        folder, _, sides = one.rpartition(":")
        click.echo(json.dumps(measure(Path(folder), sides.split(","), steps, threads)))
        return
    assert output is not None
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        for count in map(int, counts.split(",")):
            folder = Path(name) / str(count)
            folder.mkdir()
            rows.append({"experts": count} | prepare(folder, count) | {"resident_bytes": {}})
        # The numbers of experts take turns too: a machine that others use is not as fast all the time.
        runs: dict[int, list[dict[str, Any]]] = {row["experts"]: [] for row in rows}
        for _ in range(rounds):
            for row in rows:
                count = row["experts"]
                sides = [*FORMS, "transformers"]
                runs[count].append(_child(Path(name) / str(count), sides, steps, threads))
                click.echo(json.dumps({"experts": count} | runs[count][-1]))
        for row in rows:
            measured = runs[row["experts"]]
            for key in ("step_seconds", "chunk_seconds"):
                row[key] = {
                    side: round(statistics.median(run[key][side] for run in measured), 4) for side in measured[0][key]
                }
            row |= {key: measured[0][key] for key in ("logit_difference", "logit_spread")}
            for side, step in row["step_seconds"].items():
                row.setdefault("step_over_fewest", {})[side] = round(step / rows[0]["step_seconds"][side], 2)
                alone = _child(Path(name) / str(row["experts"]), [side], steps, threads)  # its stacks are there already
                row["resident_bytes"][side] = alone["resident_bytes"]
    content = {
        "what": f"decode steps, and chunks of {_CHUNK}, with six of N experts chosen, batch 1, after a prompt of "
        f"{_PROMPT} tokens; seconds are medians over {rounds} rounds of medians of {steps} steps and {_CHUNKS} chunks by turns",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {threads} threads, shared",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
        | {"foldkv": foldkv.__version__},
        "model": {
            key: CONFIG[key] for key in ("hidden_size", "moe_intermediate_size", "num_hidden_layers", "layer_types")
        },
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def _child(folder: Path, sides: list[str], steps: int, threads: int) -> dict[str, Any]:
    words = [
        sys.executable,
        __file__,
        "--one",
        f"{folder}:{','.join(sides)}",
        "--steps",
        str(steps),
        "--threads",
        str(threads),
    ]
    # Idle threads of torch that wait actively would take the processors from the next side.
    environment = os.environ | {"FOLDKV_CACHE": str(folder / "cache"), "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise click.ClickException(f"{sides} ended with {run.returncode}: {run.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
