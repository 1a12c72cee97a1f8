"""A CPU bundle at up to 1,048,576 tokens: memory, prefill, decode latency, and values retrieved from chosen depths.

``python benchmarks/million.py BUNDLE CHECKPOINT -o benchmarks/results/million-cpu.json``. Every context has a process of its own, so
its peak memory is not mixed with others. The last one holds the states of the shorter contexts too, made on the way, and
decodes at all of them in turns, so that noise of a shared machine affects all of them equally. transformers reads the same tokens up to
``--reference`` of them; beyond, the PyTorch modules that tests compare with transformers go on from the state that was reached.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

import foldkv
from foldkv.runtime.model import Model
from foldkv.runtime.session import Session
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.long_context import REFERENCE_CONTEXT, measure_depths

_TURNS, _STEPS = 7, 8


class _Watched:
    """A session that notes what its prefill took, and keeps the states that decode is measured at. It loads no torch."""

    def __init__(self, bundle: Path, context: int, chunk: int, stops: list[int]) -> None:
        self.session = Session(bundle, context=context, chunk=chunk)
        self.stops, self.prefill_s, self.peak = stops, 0.0, 0
        self.snapshots: dict[int, Any] = {}

    def tail_logits(self, tokens: Any, tail: Any) -> Any:
        """See validation.runners.TailRunner; logits float32 [m, V]."""
        start, at = time.perf_counter(), 0
        for stop in [*self.stops, len(tokens)]:
            for begin in range(at, stop, 1 << 15):
                self.session.prefill([tokens[begin : min(begin + (1 << 15), stop)]])
                print(
                    f"{min(begin + (1 << 15), stop)} tokens, {time.perf_counter() - start:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            at = stop
            if stop != len(tokens):
                self.snapshots[stop] = self.session.snapshot()
        self.prefill_s = time.perf_counter() - start
        snapshot = self.session.snapshot()
        self.session.decode([tokens[0]])
        self.peak = _peak_rss() - snapshot.bytes
        self.session.restore(snapshot)
        self.tail, self.positions = list(tail), len(tokens)
        logits = self.logits = self.session.forward([tail], logits="all")[0]
        self.session.restore(snapshot)
        self.snapshots[len(tokens)] = snapshot
        return logits

    def against_torch(self, checkpoint: Path) -> dict[str, float]:
        """The tail's logits beside those of the PyTorch modules, which go on from the same state."""
        import numpy as np
        import torch

        from foldkv.export.checkpoint.reader import Checkpoint
        from foldkv.export.loading import decoder_from_checkpoint
        from foldkv.validation.metrics import compare_logits

        decoder, count = decoder_from_checkpoint(Checkpoint(checkpoint)), len(self.tail)
        state = []
        [slot] = self.snapshots[self.positions].rows
        for tensor, rows in zip(self.session.bundle.state.tensors, slot, strict=True):
            state.append(torch.zeros(1, tensor.capacity(self.session.context), tensor.width))
            state[-1][0, : len(rows)] = torch.from_numpy(rows.copy())
        with torch.no_grad():
            logits, _ = decoder(
                torch.tensor([self.tail]), torch.tensor([self.positions], dtype=torch.int32),
                torch.tensor([count], dtype=torch.int32), torch.tensor([self.positions + count]),
                torch.arange(count)[None], state,
            )  # fmt: skip
        figures = compare_logits(logits[0].numpy()[:-1], self.logits[:-1], np.array(self.tail[1:]))
        return {"torch_kl_mean": float(figures.kl.mean()), "torch_logit_error_max": float(figures.logit_error.max())}


def _peak_rss() -> int:
    """Bytes; unlike ``ru_maxrss`` not those of the process that started this one."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure(bundle: Path, checkpoint: Path, context: int, chunk: int, stops: list[int]) -> dict[str, Any]:
    """One context in this process."""
    runner = _Watched(bundle, context, chunk, stops)
    figure = measure_depths(runner, None, Tokenizer.from_bundle(runner.session.bundle), context)
    held = sum(snapshot.bytes for at, snapshot in runner.snapshots.items() if at in stops)
    row = asdict(figure) | {
        "state_bytes": runner.session.state_bytes, "peak_rss_bytes": runner.peak - held, "prefill_s": runner.prefill_s,
    }  # fmt: skip
    if stops:
        row["decode"] = decode_in_turns(runner.session, runner.snapshots)
    return row | runner.against_torch(checkpoint)


def decode_in_turns(session: Session, snapshots: dict[int, Any]) -> list[dict[str, float]]:
    """Median seconds of a decode step at every snapshot; the snapshots take turns."""
    seconds: dict[int, list[float]] = {at: [] for at in snapshots}
    for _ in range(_TURNS):
        for at, snapshot in snapshots.items():
            session.restore(snapshot)
            for step in range(_STEPS):
                start = time.perf_counter()
                session.decode([65])
                if step >= 2:  # the first ones find other rows in the processor's cache
                    seconds[at].append(time.perf_counter() - start)
    first = statistics.median(next(iter(seconds.values())))
    return [
        {"tokens": at, "step_s": statistics.median(of), "growth": statistics.median(of) / first}
        for at, of in sorted(seconds.items())
    ]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--contexts", default="1024,65536,262144,1048576", show_default=True)
@click.option("--chunk", default=64, show_default=True)
@click.option(
    "--reference", default=REFERENCE_CONTEXT, show_default=True, help="Longest context that transformers reads."
)
@click.option("--one", type=int, help="Measure this context here and print it.")
@click.option("--stops", default="", help="With --one: shorter lengths to decode at, too.")
def main(
    bundle: Path, checkpoint: Path, output: Path | None, contexts: str, chunk: int, reference: int, one: int | None,
    stops: str,
) -> None:  # fmt: skip
    """Measure and write the results as JSON."""
    if one is not None:
        click.echo(
            json.dumps(measure(bundle, checkpoint, one, chunk, [int(stop) for stop in stops.split(",") if stop]))
        )
        return
    assert output is not None
    sizes = sorted(int(size) for size in contexts.split(","))
    rows = []
    for size in sizes:
        passed = ",".join(str(other) for other in sizes[:-1]) if size == sizes[-1] else ""
        command = [sys.executable, __file__, str(bundle), str(checkpoint), "--one", str(size), "--chunk", str(chunk)]
        run = subprocess.run([*command, "--stops", passed], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        if size <= reference:
            from foldkv.validation.runners import SessionRunner, TransformersRunner

            runner = SessionRunner(Model(bundle), context=size, chunk=chunk)
            start = time.perf_counter()
            tokenizer = Tokenizer.from_bundle(runner.session.bundle)
            rows[-1] |= asdict(measure_depths(runner, TransformersRunner(checkpoint), tokenizer, size))
            click.echo(f"both at {size}: {time.perf_counter() - start:.0f} s")
        click.echo(json.dumps(rows[-1]))
    fixed = min(row["peak_rss_bytes"] - row["state_bytes"] for row in rows)
    for row in rows:
        row["over_state_and_fixed_bytes"] = row["peak_rss_bytes"] - row["state_bytes"] - fixed
    content = {
        "what": "float32, batch 1; peak memory of a process over its life, less the states kept for the decode figures",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, 2 threads, shared",
        "versions": {name: version(name) for name in ("onnxruntime", "transformers", "torch")}
        | {"foldkv": foldkv.__version__},
        "chunk": chunk,
        "fixed_bytes": fixed,
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
