"""A whole V4-Flash on the CPU of a small machine: memory, pages, bytes from the disk, seconds.

``python benchmarks/half_real.py export/configs/deepseek-v4-flash.json --work FOLDER -o benchmarks/results/half-real-cpu.json``. The
checkpoint is half real: all sizes, formats and headers are the released ones, and every weight but the routed experts is random.
Of the experts of a layer some are *marked*: they have values, and routing goes to them alone (by the router's bias, or the table of
experts). The others are holes in the files, which nothing reads. Experts lie only in the stacks (foldkv/runtime/stacks.py), which
this script lays out, because a whole copy has 137 GiB. The matrices in the stacks are made by foldkv's own code.

A run drops the pages of all files, opens the model, and feeds single tokens, a chunk, and single tokens again; it is a process of its own.
A run with more marked experts reuses the files of the one before, and its row joins those in the results. Needs disk: 22 GiB, and 0.54 GiB for each marked expert of a layer.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from half_real_files import make, mark, stacks_of, weights_of
from memory_speed import bandwidth

import foldkv
from foldkv.export.contract.chain import CHAIN, ChainTable
from foldkv.runtime.backend import Observed
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.chain_executor import ChainExecutor


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder for all files, which are kept there."
)
@click.option("--marked", multiple=True, type=int, help="Marked experts of a layer; a run for each. Default: 8 and 56.")
@click.option("--steps", default=12, show_default=True, help="Single tokens before the chunk, and after it.")
@click.option("--chunk", default=128, show_default=True, help="Tokens of the chunk.")
@click.option("--only", type=int, hidden=True, help="Run with what is there, and print the results.")
def main(
    config: Path, output: Path, work: Path, marked: tuple[int, ...], steps: int, chunk: int, only: int | None
) -> None:  # fmt: skip
    """Measure and write the results as JSON."""
    work = work.resolve()
    os.environ["FOLDKV_CACHE"] = str(work / "cache")
    if only is not None:
        click.echo(json.dumps(run(work / "bundles" / "cpu", only, steps, chunk)))
        return
    checkpoint, counts = work / "checkpoint", sorted(marked or (8, 56))
    before = json.loads(output.read_text())["rows"] if output.exists() else []
    rows = [row for row in before if row["marked"] not in counts]
    made = make(config, work)
    for count in counts:
        laid_out = mark(checkpoint, work / "bundles" / "cpu", count)
        command = [sys.executable, __file__, str(config), "-o", str(output), "--work", str(work), "--only", str(count)]
        command += ["--steps", str(steps), "--chunk", str(chunk)]
        load = os.getloadavg()[0]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"load_before": load, "stacks": laid_out, **json.loads(done.stdout.splitlines()[-1])})
        click.echo(json.dumps({key: value for key, value in rows[-1].items() if key != "steps"}))
    content = {
        "what": "a whole V4-Flash on the cpu, half real: all but the routed experts that are not marked is random; one run for each row",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared, {_memory('MemTotal') / 2**30:.1f} GiB of memory",
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")} | {"foldkv": foldkv.__version__},
        "model": config.stem,
        "bandwidth_gb_s": round(bandwidth(), 1),
        **made,
        "rows": rows,
    }  # fmt: skip
    output.write_text(json.dumps(content, indent=2) + "\n")


def run(bundle: Path, count: int, single: int, chunk: int) -> dict[str, Any]:
    """Open the model and feed it; see the module."""
    loaded = load_bundle(bundle)
    _drop(bundle)
    free = _memory("MemAvailable")
    touched: list[set[tuple[int, int]]] = [set()]

    def note(seen: Observed) -> None:
        if _CHOSEN in seen.more:
            touched[0] |= {(seen.layer or 0, int(expert)) for expert in np.unique(seen.more[_CHOSEN])}
        if not np.isfinite(seen.streams).all():
            raise click.ClickException(f"layer {seen.layer} gave streams that are not finite")

    with _peak() as peak:
        start = time.monotonic()
        say = partial(click.echo, err=True)
        whole = ChainModel(loaded, weights_from=weights_of(bundle), matrices="bfloat16", progress=say)
        model = whole.with_graphs(_with_choices(bundle))
        opened = time.monotonic() - start
        vocabulary = loaded.model.vocab_size
        tokens = np.random.default_rng(count).integers(0, vocabulary, 2 * single + chunk)
        executor, at, steps = ChainExecutor(model, len(tokens), 1), 0, list[dict[str, Any]]()
        everything: set[tuple[int, int]] = set()
        for size in (*[1] * single, chunk, *[1] * single):
            touched[0], before, start = set(), _counters(), time.monotonic()
            logits = executor.run(
                tokens[None, at : at + size], np.array([at], np.int32), np.array([size], np.int32), at + size,
                np.array([[size - 1]], np.int64), trim=size > 1, observe=note,
            )  # fmt: skip
            seconds, at = time.monotonic() - start, at + size
            assert np.isfinite(logits).all()
            new = touched[0] - everything
            everything |= touched[0]
            spent = {key: value - before[key] for key, value in _counters().items()}
            steps.append({
                "tokens": size, "seconds": round(seconds, 3), **spent, "experts": len(touched[0]), "new_experts": len(new),
                "file_pages": _status("RssFile"), "anonymous": _status("RssAnon"),
            })  # fmt: skip
            click.echo(json.dumps(steps[-1]), err=True)
        executor.close()
        model.close()
        whole.close()
    decode = [step for step in steps if step["tokens"] == 1]
    layers = {layer for layer, _ in everything}
    return {
        "marked": count,
        "memory_available": free,
        "seconds_to_open": round(opened, 2),
        "anonymous_peak": peak[0],
        "distinct_experts": len(everything),
        "layers": len(layers),
        "first_step": decode[0]["seconds"],
        "median_step": sorted(step["seconds"] for step in decode[1:])[(len(decode) - 1) // 2],
        "median_read": sorted(step["read_bytes"] for step in decode[1:])[(len(decode) - 1) // 2],
        "chunk": next(step["seconds"] for step in steps if step["tokens"] == chunk),
        "steps": steps,
    }


#: The name of the output with the experts that were chosen.
_CHOSEN = "experts.chosen"


def _with_choices(bundle: Path) -> dict[str, bytes]:
    """The second forms of the layers with one output more."""
    found = {}
    for name, form in ChainTable.read(bundle / CHAIN).stacked.items():
        model = onnx.load(bundle / form.file)
        nodes = [node for node in model.graph.node if node.name == "experts.score"]
        for node in nodes:
            model.graph.node.append(onnx.helper.make_node("Identity", [node.input[1]], [_CHOSEN]))
            value = onnx.helper.make_tensor_value_info(_CHOSEN, onnx.TensorProto.INT64, None)
            model.graph.output.append(value)
            found[name] = model.SerializeToString()
    return found


def _drop(bundle: Path) -> None:
    """Let the system forget the pages of all files that the model maps."""
    stacks = stacks_of(bundle)
    for path in [*(path for path, _ in stacks._sources.values()), *map(stacks.path, stacks.by_owner)]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _counters() -> dict[str, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "major_faults": usage.ru_majflt, "minor_faults": usage.ru_minflt, "read_bytes": int(lines["read_bytes"]),
        "processor_ms": int(1000 * (usage.ru_utime + usage.ru_stime)),
    }  # fmt: skip


def _status(key: str) -> int:
    return _kilobytes(Path("/proc/self/status"), key)


def _memory(key: str) -> int:
    return _kilobytes(Path("/proc/meminfo"), key)


def _kilobytes(path: Path, key: str) -> int:
    [line] = [line for line in path.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The largest anonymous memory of this process meanwhile, seen every 20 ms."""
    found, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            found[0] = max(found[0], _status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
