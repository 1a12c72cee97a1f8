"""Check which of the things that foldkv can use this machine has."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from typing import Any

from .packages import (
    FEATURES,
    VARIANTS,
    has_package,
    missing,
    modules,
    overwritten,
    package_of,
    pip_line,
    purpose,
    requirement,
    version_of,
)
from .tables import table
from .units import size_text

# A package that is found may still be unusable: one of its libraries may be missing. An import may end the process, and
# takes memory.
_TRY = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
        problem = ""
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
    print(json.dumps([name, problem]), file=sys.__stdout__, flush=True)
"""


def examine() -> dict[str, Any]:
    """Facts about Python, packages, processors, memory and GPUs; nothing is changed and no GPU is touched."""
    from .plugins.cuda import device_capability, device_count

    absent = set(missing(modules()))
    problems = import_problems([module for module in modules() if module not in absent])
    devices = device_count()
    lacks = {}
    for name, feature in FEATURES.items():
        without = [m for m in feature.modules if m in absent and VARIANTS.get(m) != feature.package]
        without += [feature.package] if feature.package and not has_package(feature.package) else []
        broken = [module for module in feature.modules if module in problems]
        what = [package_of(module) for module in without]
        what += [f"{package_of(module)}, which cannot be imported" for module in broken]
        what += ["a GPU"] if feature.gpu and not devices else []
        lacks[name] = {"what": what, "install": pip_line(without) if without else ""}
    return {
        "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cuda_devices": devices,
        "compute_capability": device_capability(),
        "packages": [
            {
                "package": package_of(module),
                "version": None if module in absent else version_of(module) or "unknown",
                "needs": requirement(module).removeprefix(package_of(module)),
                "problem": problems.get(module, ""),
                "for": purpose(module),
            }
            for module in modules()
        ],
        "overwritten": overwritten(),
        "can": {name: not row["what"] for name, row in lacks.items()},
        "lacks": lacks,
    }


def doctor_lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text for people."""
    rows = [["package", "version", "needed", "for"]]
    for row in facts["packages"]:
        rows.append([row["package"], row["version"] or "missing", row["needs"], row["for"]])
    memory = size_text(facts["memory_bytes"])
    lines = [
        f"Python {facts['python']}, {facts['processors']} processors, {memory}, {facts['cuda_devices']} CUDA devices",
        *table(rows),
        "",
    ]
    for name, works in facts["can"].items():
        lacks = facts["lacks"][name]
        lines.append(f"{name}: {'yes' if works else 'no, needs ' + ', '.join(lacks['what'])}")
        if lacks["install"]:
            lines.append(f"  {lacks['install']}")
    lines += facts["overwritten"].values()
    return lines + [
        f"{row['package']} is installed, but cannot be imported: {row['problem']}"
        for row in facts["packages"]
        if row["problem"]
    ]


def import_problems(names: list[str]) -> dict[str, str]:
    """Modules that cannot be imported, with the reason; they are imported in a separate process."""
    problems: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        command = [sys.executable, "-c", _TRY, json.dumps(sys.path), *waiting]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        for line in done.stdout.splitlines():
            try:
                name, problem = json.loads(line)
            except (ValueError, TypeError):
                continue  # packages write to stdout too
            waiting.remove(name)
            if problem:
                problems[name] = problem[:400]
        if waiting and done.returncode:
            code = done.returncode
            ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            problems[waiting.pop(0)] = f"the import ended the process {ended}"
        elif waiting:
            break
    return problems
