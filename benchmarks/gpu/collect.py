"""The result files of a run as one: ``python benchmarks/gpu/collect.py OUT`` writes OUT/gpu-DEVICE.json.

Steps that a later run repeated replace those of an earlier one: ``collect.py OUT --into benchmarks/results``. A step keeps its
own date, driver and versions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

STEPS = ("kernels", "engine", "model", "stability", "sanitizer", "layers", "speed")


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@click.option("--into", type=click.Path(path_type=Path), help="Folder of an older file to add to; the default is OUT.")
def main(out: Path, into: Path | None) -> None:
    """Write the file and print a line per step."""
    facts = json.loads((out / "facts.json").read_text())
    name = re.sub(r"[^a-z0-9]+", "-", (facts["device"] or "none").lower().replace("nvidia", "")).strip("-")
    path = (into or out) / f"gpu-{name}.json"
    older: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    steps = older.get("steps", {})
    for step in STEPS:
        if (out / f"{step}.json").exists():
            steps[step] = json.loads((out / f"{step}.json").read_text())
    whole = {key: facts[key] for key in ("device", "sm", "memory")} | {
        "steps": {step: steps[step] for step in STEPS if step in steps}
    }
    path.write_text(compact(whole) + "\n")
    for step, content in whole["steps"].items():
        failed = f", {len(content['reasons'])} reasons" if content["reasons"] else ""
        click.echo(f"{step}: {content['status']}, {len(content['rows'])} rows in {content['seconds']} s{failed}")
    click.echo(str(path))


def compact(content: Any, indent: int = 0) -> str:
    """JSON with a line per row of a list, so a change of one row changes one line."""
    pad = " " * (indent + 1)
    if isinstance(content, dict) and indent < 4:
        kept = {key: value for key, value in content.items() if key not in _LEFT_OUT}
        inner = ",\n".join(f"{pad}{json.dumps(key)}: {compact(value, indent + 1)}" for key, value in kept.items())
        return f"{{\n{inner}\n{' ' * indent}}}" if inner else "{}"
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return "[\n" + ",\n".join(f"{pad}{json.dumps(_short(value))}" for value in content) + f"\n{' ' * indent}]"
    return json.dumps(_short(content))


#: What helps to find a fault and stays in the step's own file.
_LEFT_OUT = ("traceback", "stderr", "latest", "messages", "unpacking")


def _short(value: Any) -> Any:
    """Numbers with five digits, which is what a measurement has; files by their names, without the machine's folders."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return re.sub(r"(?<![\w:])/(?:[\w.+-]+/)+", "", value)
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items() if key not in _LEFT_OUT}
    return [_short(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
