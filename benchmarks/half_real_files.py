"""The files of half_real.py and half_real_validate.py: a checkpoint with random weights but experts, its bundle, and stacks with some experts
that have values."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foldkv.export.contract.chain import CHAIN, ChainTable
from foldkv.export.contract.lock import LOCK, WeightsLock
from foldkv.export.contract.stacks import DIGEST, Decoded, header, offsets
from foldkv.export.locate import find_weights
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.stacks import Stacks
from foldkv.runtime.weight_files import WeightFiles

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE.parent / "tests" / "support"), str(_HERE / "gpu")]

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
#: The router's bias of experts that are not marked: no score makes up for it.
_NEVER = -1e4
#: How a script marks what the checkpoint and the stacks have; the stacks' header has it too.
_MARKED = "marked"


def make(config: Path, work: Path, marked: int = 0, tokenizer: Path | None = None) -> dict[str, Any]:
    """Write the checkpoint, export it and build the bundle, unless they are there.

    Args:
        config: the released config.json.
        work: folder for all of it.
        marked: experts of a layer that have values in the checkpoint too; routing goes to them then.
        tokenizer: a tokenizer.json to put beside the weights.
    """
    from checkpoints import sparse_checkpoint

    facts = work / "made.json"
    if facts.exists():
        found: dict[str, Any] = json.loads(facts.read_text())
        return found
    checkpoint = sparse_checkpoint(config, work / "checkpoint")
    for file in sorted(checkpoint.glob("*.safetensors")):
        _fill(file, marked)
    if marked:
        _route(checkpoint, marked)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, checkpoint / "tokenizer.json")
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


def _fill(file: Path, marked: int) -> None:
    """Give every tensor of a file random values, but routed experts that are not among the first ``marked``."""
    from random_weights import _drawn, header_of

    head = header_of(file)
    table = {name: row for name, row in json.loads(head[8:]).items() if name != "__metadata__"}
    generator = torch.Generator().manual_seed(int(re.findall(r"\d+", file.name)[0]))
    with file.open("r+b") as out:
        for name, row in table.items():
            expert = _EXPERT.search(name)
            if (expert and int(expert[1]) >= marked) or row["dtype"] == "I64":
                continue
            out.seek(len(head) + row["data_offsets"][0])
            _drawn(name, table, generator).view(torch.uint8).numpy().tofile(out)


def mark(checkpoint: Path, bundle: Path, count: int) -> dict[str, Any]:
    """Let routing go to the first ``count`` experts, and give them values in the stacks."""
    before = stacks_of(bundle).folder
    _route(checkpoint, count)
    stacks = stacks_of(bundle)
    if before.exists() and before != stacks.folder:
        before.rename(stacks.folder)  # the same stacks, but the checkpoint's files have other dates now
    return lay_out(stacks, count, drawn=True)


def lay_out(stacks: Stacks, count: int, *, drawn: bool) -> dict[str, Any]:
    """Write the stacks with the first ``count`` experts: random ones, or those of the checkpoint. The others are holes."""
    start = time.monotonic()
    stacks.folder.mkdir(parents=True, exist_ok=True)
    written = sum(_lay_out(stacks, owner, parts, count, drawn) for owner, parts in stacks.by_owner.items())
    shape = next(
        one.shape for parts in stacks.by_owner.values() for one in parts.values() if not isinstance(one, Decoded)
    )
    return {
        "bytes": stacks.bytes, "written": written, "seconds": round(time.monotonic() - start, 1),
        "expert_bytes": _expert_bytes(stacks) * count * len([o for o, p in stacks.by_owner.items() if len(p)]),
        "experts": shape[0],
    }  # fmt: skip


def _route(checkpoint: Path, count: int) -> None:
    """Let routing go to the first ``count`` experts alone."""
    from random_weights import header_of

    rng = np.random.default_rng(count)
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


def stacks_of(bundle: Path) -> Stacks:
    lock, files = WeightsLock.read(bundle / LOCK), WeightFiles()
    source = load_bundle(bundle).manifest.inputs.checkpoint
    paths = find_weights(bundle, lock, source, weights_of(bundle))
    for name, path in paths.items():
        files.open(name, path, lock.files[name])
    return Stacks(ChainTable.read(bundle / CHAIN), lock, paths, files)


def weights_of(bundle: Path) -> Path:
    """Another name of the checkpoint: its own is for files that nobody wrote since the export, and these have been marked."""
    name = bundle.parents[1] / "weights"
    if not name.exists():
        name.symlink_to("checkpoint")
    return name


def _expert_bytes(stacks: Stacks) -> int:
    parts = next(iter(stacks.by_owner.values())).values()
    return sum(one.bytes // one.shape[0] for one in parts if not isinstance(one, Decoded))


def _lay_out(stacks: Stacks, owner: str, parts: Any, count: int, drawn: bool) -> int:
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
            for expert in range(have, count):
                own = stacks._lock.weights[owner][stack.of]
                made = _codes(rng, role, stack.shape[2], size) if drawn else stacks._rows(stack, own, expert).tobytes()
                written += out.write(made)
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
