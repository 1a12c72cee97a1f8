"""A whole V4-Flash on the CPU of a small machine: memory, pages, bytes from the disk, seconds.

``python benchmarks/half_real.py export/configs/deepseek-v4-flash.json --work FOLDER -o benchmarks/results/half-real-cpu.json``. The
checkpoint is half real: all sizes, formats and headers are the released ones, and every weight but the routed experts is random.
Of the experts of a layer some are *marked*: they have values, and routing goes to them alone (by the router's bias, or the table of
experts). The others are holes in the files, which nothing reads. Experts lie only in the stacks (foldkv/runtime/stacks.py), which
this script lays out, because a whole copy has 137 GiB. The matrices in the stacks are made by foldkv's own code.

A run drops the pages of all files, opens the model, and feeds single tokens, a chunk, and single tokens again; it is a process of its own.
A run with more marked experts reuses the files of the one before. Needs disk: 22 GiB, and 0.54 GiB for each marked expert of a layer.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch

import foldkv
from foldkv.export.contract.chain import CHAIN, ChainTable
from foldkv.export.contract.lock import LOCK, WeightsLock
from foldkv.export.contract.stacks import DIGEST, Decoded, header, offsets
from foldkv.export.locate import find_weights
from foldkv.runtime.backend import Observed
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.chain_executor import ChainExecutor
from foldkv.runtime.stacks import Stacks
from foldkv.runtime.weight_files import WeightFiles

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE.parent / "tests" / "support"), str(_HERE / "gpu")]

_EXPERT = re.compile(r"\.experts\.\d+\.")
#: The router's bias of experts that are not marked: no score makes up for it.
_NEVER = -1e4
#: How a script marks what the checkpoint and the stacks have; the stacks' header has it too.
_MARKED = "marked"
CHUNK, STEPS = 128, 12


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder for all files, which are kept there."
)
@click.option("--marked", multiple=True, type=int, help="Marked experts of a layer; a run for each. Default: 8 and 56.")
@click.option("--only", type=int, hidden=True, help="Run with what is there, and print the results.")
def main(config: Path, output: Path, work: Path, marked: tuple[int, ...], only: int | None) -> None:
    """Measure and write the results as JSON."""
    work = work.resolve()
    os.environ["FOLDKV_CACHE"] = str(work / "cache")
    if only is not None:
        click.echo(json.dumps(run(work / "bundles" / "cpu", only)))
        return
    checkpoint, rows = work / "checkpoint", []
    made = make(config, work)
    for count in sorted(marked or (8, 56)):
        laid_out = mark(checkpoint, work / "bundles" / "cpu", count)
        command = [sys.executable, __file__, str(config), "-o", str(output), "--work", str(work), "--only", str(count)]
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


def make(config: Path, work: Path) -> dict[str, Any]:
    """Write the checkpoint without marked experts, export it and build the bundle, unless they are there."""
    from checkpoints import sparse_checkpoint

    facts = work / "made.json"
    if facts.exists():
        found: dict[str, Any] = json.loads(facts.read_text())
        return found
    checkpoint = sparse_checkpoint(config, work / "checkpoint")
    for file in sorted(checkpoint.glob("*.safetensors")):
        _fill(file)
    seconds = {}
    for name, words in {
        "export": ("export", checkpoint, "-o", work / "graph"),
        "build": ("build", work / "graph", "-o", work / "bundles", "--target", "cpu"),
    }.items():
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "foldkv", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
        seconds[name] = round(time.monotonic() - start, 1)
    bundle = work / "bundles" / "cpu"
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    content = {"seconds": seconds, "bundle_bytes": size}
    facts.write_text(json.dumps(content))
    return content


def _fill(file: Path) -> None:
    """Give every tensor of a file random values, but routed experts."""
    from random_weights import _drawn, header_of

    head = header_of(file)
    table = {name: row for name, row in json.loads(head[8:]).items() if name != "__metadata__"}
    generator = torch.Generator().manual_seed(int(re.findall(r"\d+", file.name)[0]))
    with file.open("r+b") as out:
        for name, row in table.items():
            if _EXPERT.search(name) or row["dtype"] == "I64":
                continue
            out.seek(len(head) + row["data_offsets"][0])
            _drawn(name, table, generator).view(torch.uint8).numpy().tofile(out)


def mark(checkpoint: Path, bundle: Path, count: int) -> dict[str, Any]:
    """Let routing go to the first ``count`` experts, and give them values in the stacks."""
    from random_weights import header_of

    rng, before = np.random.default_rng(count), _stacks(bundle).folder
    for file in sorted(checkpoint.glob("*.safetensors")):
        head = header_of(file)
        for name, row in json.loads(head[8:]).items():
            if not name.endswith(("gate.bias", "tid2eid")):
                continue
            if name.endswith("bias"):
                values = np.where(np.arange(row["shape"][0]) < count, 0, _NEVER).astype(np.float32)
            else:
                tokens, chosen = row["shape"]
                values = rng.permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, :chosen].astype(np.int64)
            with file.open("r+b") as out:
                out.seek(len(head) + row["data_offsets"][0])
                values.tofile(out)
    stacks, start = _stacks(bundle), time.monotonic()
    if before.exists() and before != stacks.folder:
        before.rename(stacks.folder)  # the same stacks, but the checkpoint's files have other dates now
    stacks.folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for owner, parts in stacks.by_owner.items():
        written += _lay_out(stacks, owner, parts, count)
    shape = next(
        one.shape for parts in stacks.by_owner.values() for one in parts.values() if not isinstance(one, Decoded)
    )
    return {
        "bytes": stacks.bytes, "written": written, "seconds": round(time.monotonic() - start, 1),
        "expert_bytes": _expert_bytes(stacks) * count * len([o for o, p in stacks.by_owner.items() if len(p)]),
        "experts": shape[0],
    }  # fmt: skip


def _stacks(bundle: Path) -> Stacks:
    lock, files = WeightsLock.read(bundle / LOCK), WeightFiles()
    source = load_bundle(bundle).manifest.inputs.checkpoint
    paths = find_weights(bundle, lock, source, _weights(bundle))
    for name, path in paths.items():
        files.open(name, path, lock.files[name])
    return Stacks(ChainTable.read(bundle / CHAIN), lock, paths, files)


def _weights(bundle: Path) -> Path:
    """Another name of the checkpoint: its own is for files that nobody wrote since the export, and these have been marked."""
    name = bundle.parents[1] / "weights"
    if not name.exists():
        name.symlink_to("checkpoint")
    return name


def _expert_bytes(stacks: Stacks) -> int:
    parts = next(iter(stacks.by_owner.values())).values()
    return sum(one.bytes // one.shape[0] for one in parts if not isinstance(one, Decoded))


def _lay_out(stacks: Stacks, owner: str, parts: Any, count: int) -> int:
    """The file of a layer; returns the bytes that were written."""
    path, begins, have, written = stacks.path(owner), offsets(parts), 0, 0
    if path.exists():
        with path.open("rb") as file:
            have = int(json.loads(file.read(4096)[8:])["__metadata__"][_MARKED])
    rng = np.random.default_rng([count, int(owner.split(".")[1])])
    with path.open("r+b" if path.exists() else "w+b") as out:
        for role, stack in parts.items():
            if isinstance(stack, Decoded):
                if not have:
                    out.seek(begins[role])
                    for block in stacks._values(stack, owner):
                        written += out.write(block.data)
                continue
            size = stack.bytes // stack.shape[0]
            out.seek(begins[role] + have * size)
            for _ in range(have, count):
                written += out.write(_codes(rng, role, stack.shape[2], size))
        out.truncate(4096 + sum(one.bytes for one in parts.values()))
        out.seek(0)
        out.write(header(parts, {"layer": owner, DIGEST: "not hashed", _MARKED: str(max(have, count))}))
        os.fsync(out.fileno())
    return written


def _codes(rng: Any, role: str, width: int, size: int) -> bytes:
    """Random e2m1, or scales that keep a product of a normalised input near one."""
    if not role.endswith("scales"):
        return bytes(rng.bytes(size))
    inputs = width * 32
    power = 127 - round(np.log2(2.5 * inputs**0.5))
    return bytes(rng.integers(power - 1, power + 2, size, dtype=np.uint8).tobytes())


def run(bundle: Path, count: int) -> dict[str, Any]:
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
        model = ChainModel(loaded, weights_from=_weights(bundle), instead=_with_choices(bundle), progress=say)
        opened = time.monotonic() - start
        vocabulary = loaded.model.vocab_size
        tokens = np.random.default_rng(count).integers(0, vocabulary, 2 * STEPS + CHUNK)
        executor, at, steps = ChainExecutor(model, len(tokens), 1), 0, list[dict[str, Any]]()
        everything: set[tuple[int, int]] = set()
        for size in (*[1] * STEPS, CHUNK, *[1] * STEPS):
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
        "chunk": next(step["seconds"] for step in steps if step["tokens"] == CHUNK),
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
    stacks = _stacks(bundle)
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


def bandwidth() -> float:
    """GB/s at which all processors read memory: the best of several runs over 1 GiB."""
    from concurrent.futures import ThreadPoolExecutor

    count = len(os.sched_getaffinity(0))
    parts: Sequence[Any] = np.split(np.ones(1 << 28, np.float32), count)
    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for _ in range(5):
            start = time.monotonic()
            list(pool.map(np.max, parts))
            best = max(best, (1 << 30) / (time.monotonic() - start) / 1e9)
    return best


if __name__ == "__main__":
    main()
