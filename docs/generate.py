"""Write docs/cli.md from the commands' own help, and the tables of README and docs from benchmarks/results.

A test compares both with what is there. ``make docs``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import result_tables

from foldkv.cli import main
from foldkv.validation.gates import PROFILE_GATES

ROOT = Path(__file__).parents[1]
CLI = ROOT / "docs" / "cli.md"
#: Between these marks lies a table; the first names it.
BEGIN, END = "<!-- made by docs/generate.py: {} -->", "<!-- end -->"

PIPELINE = """## A pipeline file

```toml
version = 1
checkpoint = "DeepSeek-V4-Flash"   # paths are relative to this file
output = "out"                     # out/graph, out/bundles/<target>, out/report

[export]
profile = "hf"                     # "served": what deployed systems compute
weights = "float32"                # "reference": the checkpoint's files in place, "repack": copied as they are stored
allow_unknown_keys = []            # keys of config.json to ignore that would be refused because nobody knows them

[build]
targets = ["cpu", "a100"]
plugins = "on"                     # "off": function bodies in engines of GPU targets, dense rows only
layout = "dense"                   # with plugins also "fp8" or "fp8+fp4"; "fp8+fp4" for a served graph on the cpu
jobs = 2                           # builds at once; without it, what memory and processors allow

[build.shapes]                     # smallest, typical, largest; engines are optimised for the typical size
batch = [1, 1, 4]
chunk = [1, 1, 256]
context = [256, 4096, "64k"]       # numbers of tokens are read as on the command line: 65536 or "64k", "1M"

[validate]
enabled = true
target = "cpu"                     # reports measure the bundle of the cpu; engines cannot be validated yet
seed = 0
text = "manual.txt"                # UTF-8 text to measure on; without it, sources of Python's standard library
texts = 6
text_tokens = 384
distances = [16, 64, 128, 256, 512]
cases_per_distance = 20
contexts = ["64k"]                 # long streams with planted values; without it, none
gates = { kl-mean = 1e-6 }         # thresholds that replace the defaults below
baseline = "release-1/report"      # an older report: the new one shows what changed since; without it, none
threads = 1                        # of both sides; without it, 1 for a small model, else all processors
```

Every key is shown. Only `version`, `checkpoint` and `output` are required. The values of `targets`, `jobs`, `text`, `contexts`, `gates`, `baseline`
and `threads` are examples; all others are the defaults.

What cannot succeed is refused before the first stage: targets that this machine cannot build for, layouts that a target cannot keep,
missing packages, folders that cannot be written. A stage is skipped when the hashes of its inputs, its settings and the versions of
its tools are unchanged. Where only thresholds or the baseline changed, `validate` measures nothing: it judges the figures of the report
again. `foldkv run --dry-run` says which stages would run and why.
"""

VERDICTS = """## The gates of `validate`

A gate *holds*, *fails*, or is *not informative*: its figure is within the threshold, but was measured on less than the gate needs. Such a
gate does not pass: the exit code is 1 and `junit.xml` has an error, with the reason and what to change. A figure beyond its threshold
fails, however little it was measured on. Gates that were not asked for are not listed: `long-context` without contexts that the reference reads,
`topk-overlap` and `mass-recalled` for a model without indexers.

Where index scores tie exactly at the last place, several sets of entries are equally good. ReLU makes such ties common in small and
random models. Of its own equally good sets, the reference then takes the one closest to the subject's. The report counts the ties.

A threshold that is not the default is marked as loosened or tightened in every form of the report. A threshold with which a gate could
never fail or never hold is refused.
"""


SHELL = """## Around every command

Results go to stdout; progress, warnings and errors go to stderr. On a terminal long work shows a bar, the elapsed time and the
time left; in a log, lines with their time. The time left comes from what is counted, or from earlier runs on this machine.
A command that waits for another process, because both write the same folder, names that process.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | a validation gate failed |
| 2 | bad usage or bad input. Errors of the operating system too: a full disk, a forbidden folder, a file in the way |
| 3 | this machine lacks something: a package, a device, memory. The message has the pip line |
| 4 | internal error. Run again with `-v` before the command and report it |
| 130, 143, 129 | interrupted by Ctrl-C (SIGINT), SIGTERM or SIGHUP |

A signal ends a command within two seconds, with its child processes. Artifacts are written beside their place and renamed when
they are whole, so that an interrupted command leaves the old artifact or none. What a killed process leaves, the next run
removes. `export --weights repack` keeps the files that it has copied and goes on with them.

With `--json` an error is an object on stdout as well, and the exit code stays:

```json
{"error": {"type": "MissingDependencyError", "message": "`export` needs torch, ...", "exit_code": 3,
           "packages": ["torch"], "install": "pip install 'foldkv[export]'"}}
```

`type` is a class of `foldkv.errors`, `InternalError`, `Interrupted`, or a class of click for wrong usage. `packages` and `install`
are there where packages are missing or cannot be imported; `path` and `reason` ("ENOSPC") where the operating system refused. A
command that did its work prints its result and no error, also where a gate failed (1) or a target was not built.

Warnings of the loggers `foldkv.*` are shown as `warning: ...`. `-v` before the command shows more: what foldkv does on the way,
what packages warn of, and tracebacks. The library prints nothing by itself; give the logger `foldkv` a handler to see its warnings.
Functions that take `progress` call it with one line per step; a `foldkv.progress.Progress` learns counts and estimates too.
"""


def reference() -> str:
    """The text of docs/cli.md."""
    parts = [
        "# The command line\n\nGenerated by `make docs` from the commands' help.\n",
        SHELL,
    ]
    context = click.Context(main, info_name="foldkv", terminal_width=100, **main.context_settings)
    parts.append(f"```\n{main.get_help(context)}\n```\n")
    for name in main.list_commands(context):
        command = main.commands[name]
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100)
        parts.append(f"## foldkv {name}\n\n```\n{command.get_help(inner)}\n```\n")
    parts.append(PIPELINE)
    parts.append(VERDICTS)
    for profile, gates in PROFILE_GATES.items():
        rows = [
            f"| `{g.name}` | `{g.metric}` {g.comparison} {g.threshold:g} | {'; '.join(n.words(g.threshold) for n in g.needs)} | {g.reason} |"
            for g in gates
        ]
        parts.append(
            f"Profile `{profile}`:\n\n| gate | default | needs | why |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


#: The tables by page and by the name in their mark.
TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"executed": lambda: result_tables.executed(result_tables.gpu_results())},
    ROOT / "docs" / "gpu.md": {"times": lambda: result_tables.times(result_tables.gpu_results())},
    ROOT / "docs" / "results.md": {
        make.__name__: make
        for make in (
            result_tables.decode,
            result_tables.experts,
            result_tables.million,
            result_tables.stages,
            result_tables.exports,
        )
    },
}


def made_anew(text: str, makers: dict[str, Callable[[], str]]) -> str:
    """A page with every table between its marks made anew.

    Raises:
        ValueError: a table has no place in the page.
    """
    for name, make in makers.items():
        before, found, rest = text.partition(BEGIN.format(name))
        if not found or END not in rest:
            raise ValueError(f"there is no place for the table {name!r}: {BEGIN.format(name)} ... {END}")
        text = f"{before}{found}\n{make()}\n{END}{rest.split(END, 1)[1]}"
    return text


if __name__ == "__main__":
    CLI.write_text(reference(), encoding="utf-8")
    for page, makers in TABLES.items():
        page.write_text(made_anew(page.read_text(encoding="utf-8"), makers), encoding="utf-8")
