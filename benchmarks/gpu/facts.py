"""What the machine is: GPU, driver and versions. ``python benchmarks/gpu/facts.py -o OUT/facts.json``."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import click
import kit

from foldkv.plugins.cuda import device_capability


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(output: Path) -> None:
    """Write the facts; without a GPU the device is empty."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
        device, driver, memory = (part.strip() for part in told.split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        device = driver = memory = ""
    facts = {
        "device": device, "driver": driver, "memory": memory, "sm": device_capability(), "date": time.strftime("%Y-%m-%d"),
        "versions": kit.versions(),
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts, indent=1) + "\n")
    click.echo(json.dumps(facts))


if __name__ == "__main__":
    main()
