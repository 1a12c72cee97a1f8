"""Write docs/cli.md from the commands' own help, and the tables of README and docs from benchmarks/results.

A test checks that both are current. ``make docs``.
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
#: A table is between these marks; the first mark names it.
BEGIN, END = "<!-- made by docs/generate.py: {} -->", "<!-- end -->"

PIPELINE = """## A pipeline file

```toml
version = 1
checkpoint = "DeepSeek-V4-Flash"   # paths are relative to this file
output = "out"                     # out/graph, out/bundles/<target>, out/report or out/reports/<target>

[export]
profile = "hf"                     # "served": what deployed systems compute
allow_unknown_keys = []            # keys of config.json to ignore, although foldkv does not know what they change

[build]
targets = ["cpu", "a100"]
backend = "tensorrt-rtx"           # for the GPUs, instead of the first that `foldkv targets` lists; the cpu keeps its own
plugins = "on"                     # "off": function bodies in engines of GPU targets, dense rows only
layout = "dense"                   # with plugins also "fp8" or "fp8+fp4"; "fp8+fp4" for a served graph in ONNX Runtime
jobs = 2                           # targets at once; default: the processors
cache = "plans"                    # plans of engines, which machines can share; default: FOLDKV_CACHE
ray = "local"                      # or the address of a Ray cluster: its workers build the plans of engines; default: this process

[build.shapes]                     # smallest, typical, largest; engines are optimised for the typical size
batch = [1, 1, 64]                 # sequences in a decode step
chunk = [1, 1, 256]                # tokens of a sequence that go through the model at once
context = [256, 4096, "64k"]       # numbers of tokens as on the command line: 65536, "64k", "1M"; default: up to the model's largest

[validate]
enabled = true
targets = ["cpu"]                  # the bundles to measure; with several, each report is in a folder of its own
devices = [0, 1]                   # GPUs that share the layers of engines; default: the first alone
seed = 0
text = "manual.txt"                # UTF-8 text to measure on; default: sources of Python's standard library
texts = 6
text_tokens = 384
distances = [16, 64, 128, 256, 512]
cases_per_distance = 20
cases_per_kind = 8                 # of each kind of behaviour; 0 for none
case_tokens = 256                  # of such a case, at most
sweep_cases = 1                    # values with prompts of each length around multiples of 128 and of the window
contexts = ["64k"]                 # long streams with planted values; default: none
gates = { kl-mean = 1e-6 }         # thresholds that replace the defaults below
baseline = "release-1/report"      # an older report, or the folder of several: shows what has changed since; default: none
threads = 1                        # for bundle and reference; default: 1 for a small model, else all processors
ray = "local"                      # or the address of a Ray cluster: its workers answer texts and cases; default: this process
```

Every key is shown. Only `version`, `checkpoint` and `output` are required. The values of `build.targets`, `backend`, `jobs`, `cache`, `context`, `devices`, `text`, `contexts`,
`gates`, `baseline`, `threads` and both `ray` are examples; all others are the defaults.

A run that cannot succeed is refused before the first stage. Reasons are targets that this machine cannot build for, layouts that a
target cannot keep, missing packages, and folders that cannot be written. A stage is skipped if the hashes of its inputs, its settings
and the versions of its tools are unchanged. If only thresholds or the baseline changed, `validate` measures nothing: it judges the
figures of the report again. `foldkv run --dry-run` shows which stages would run and why.

A bundle in `validate.targets` whose GPU is not in this machine gets a report too: it says "not executed here", none of its gates is
informative, and the exit code is 3 after everything else was done. Such a bundle is tried again in the next run.
"""

VERDICTS = """## The gates of `validate`

A gate *holds*, *fails*, or is *not informative*: its figure is within the threshold, but was measured on less than the gate needs. Such a
gate does not pass: the exit code is 1 and `junit.xml` has an error, with the reason and what to change. A figure beyond its threshold
fails, however little it was measured on. Gates that do not apply are not listed: `long-context` without contexts that the reference reads,
`topk-overlap` and `mass-recalled` for a model without indexers, `behaviour` and `sweep` if no cases were asked for; the
report then has a note that says so.

Texts, questions and streams begin with the special tokens that the bundle's tokenizer puts before a text, such as the one that begins a
sequence, because a served prompt begins with them. They count in `--text-tokens`, `--case-tokens`, `--context` and the lengths of the sweep.
What the tokenizer puts after a text is left out: it would stand between a question and its answer.

**Behaviour** is reported by kind: `dense` (one of many different key-value pairs), `code` (the exact signature of a named function), `clauses` (which of
several near-duplicate licence clauses), `hops` (a value behind two references), `aggregation` (the most frequent word), and the `sweep` (exact values
with prompts of every length mod 4 and around multiples of 128 and of the window, by distance). Each line has the cases, what the reference and the
bundle answer exactly, with Wilson intervals, and an exact McNemar test. A kind in which the reference does no better than guessing, or answers so
few that losing all of them could be chance, says "no statement". The gate `behaviour` tests all cases together; `sweep` compares distributions, so it
sees lengths at which the model itself answers nothing. The default is a few cases; for a release ask for more: `--cases-per-kind 100
--case-tokens 8k --sweep-cases 20`.

**A model that does not fit into memory** goes a layer at a time (`--layered`; the default if its references take more than 60 % of the
machine's free memory, or of what a container may still take: 4 bytes a parameter, 4 more for the oracle of `served`, 2 more for the yardstick in bfloat16). The references (float32, the yardstick in bfloat16, the oracle of the profile `served`): their layers, one after the other, over all
texts; experts in groups of 1 GiB; weights dequantised as they are read. A bundle for the cpu likewise: all chunks of all texts go through a layer before any goes through the next, so that weights are read once
and not again for every chunk. Only the steps after a restored snapshot are compared in a session, over 24 tokens, and texts of more than 32,768 tokens
go through one. The figures are those of the whole model, to the bit; KL at the answers of cases up to rounding. A pass through all weights takes 8,192
tokens of texts and cases, and a run that was interrupted goes on after its last layer, from `REPORT.foldkv-reference`.

Such a run holds what flows through one layer. What is kept of every layer (streams, choices) and logits are files in `REPORT.foldkv-reference` that are read
back when they are compared: memory grows with tokens, and not with layers. It takes, beside the bundle's state, at most

```text
2 GiB + 4 T C (2 N + K + 3) + max(layer, ends)
layer = 5 P + W + 12 I C + 4 (4 H q k + H D (5 q + 3 k) + 4 N C q)
ends  = 8 V (C + n)
```

bytes, with `n` tokens of the longest text or case, `T` of a pass (the largest of 8,192, `n` and the contexts of up to 65,536), width `C`, `N` streams, `K`
experts of a token, `P` parameters of the largest layer without its routed experts, `W` bytes of a group of experts in float32 (1 GiB, or all of a layer if
they are less), `I` the experts' inner width, `H` heads of `D`, vocabulary `V`. A text has `q = n` queries on `k = n + n / r`
keys, with `r` tokens an entry; a context of `c` tokens `q = 256` on `k = 256 + window + c / r`. For V4-Flash that is 13.9 GiB with a text of 2,100 tokens,
in which the indexers have a choice, 8.4 with 384 and 30.3 with 4,000; [a run](results.md#a-whole-v4-flash-validated) with 272 tokens took 8.1. The disk gets the streams after every layer,
`4 N C` bytes a token, three times for the first text (of a bundle for a GPU once more for each other text), and logits and choices; twice for each token of a case; and for a
long context once where the reference reads it, and once more where a bundle for the cpu does (up to 32,768 tokens). Two passes more are there while a file is
replaced. For V4-Flash that is 24.3 GiB with that one text, and 128 KiB more for each token of cases. A run that would not fit into the
free memory or on the disk is refused before it begins, and the message says how many tokens would, or which contexts to leave out. A report on a file system in
memory (tmpfs, such as `/tmp` or `/dev/shm` on many machines) makes these files take memory too, and both must fit together: name a `--report` folder on a disk.
Files that another run left in `REPORT.foldkv-reference` (another plan, bundle, text, number of threads, or other versions) are removed when a run begins.

Where index scores tie exactly at the last place, several sets of entries are equally good. ReLU makes such ties common in small and
random models. The reference then takes the one of its equally good sets that is closest to the subject's. The report counts the ties.

**Bundles in bfloat16** (all engines) are judged by a yardstick: transformers computes the same texts in bfloat16 too, and its distance
from float32 is in the report. The threshold is the one of float32 below, and in addition two times that distance for errors and shares, and
four times for KL, which grows with the square of an error. `chunks` compares by KL (`chunk_kl_mean`), and `retrieval` may lose 0.03. If
PyTorch's own bfloat16 is so far from float32 that the threshold would mean nothing, the gate is not informative. A graph of the profile `hf` in
packed rows is judged like any other of that profile: rows cost more than bfloat16, and gates may fail. Export with `--profile served` to
compare packed rows with what they must compute.

`layers` compares each layer of such a bundle by itself: PyTorch's layer gets the bundle's own streams before it, in float32 and, for the
yardstick, in bfloat16. The *own* error of a token is the largest difference of its streams after the layer, over their root mean square. The
median token's may be 1e-3 and two times the yardstick's, and 5 % of the tokens and two times the yardstick's share may be *moved*: five times the limit
or more away, because they took another expert or another entry. The first layer beyond its limit is the first divergence; later layers do not
inherit its error. A bundle for a GPU does not say which entries its indexers chose: they are recomputed in float32 from its streams and index
rows, and the report says so.

A threshold that is not the default is marked as loosened or tightened in every form of the report. A threshold with which a gate could
never fail or never hold is refused.
"""


SHELL = """## Around every command

Results go to stdout; progress, warnings and errors go to stderr. On a terminal, long work shows a bar, the elapsed time and the
time left; in a log, it prints lines with a time. The time left is estimated from what is done, or from earlier runs on this machine.
A command that waits for another process, because both write the same folder, names that process.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | a validation gate failed |
| 2 | bad usage or bad input; also errors of the operating system: a full disk, a forbidden folder, a file in the way |
| 3 | this machine lacks something: a package, a device, memory. The message has the pip line |
| 4 | internal error. Run again with `-v` before the command and report it |
| 130, 143, 129 | interrupted by Ctrl-C (SIGINT), SIGTERM or SIGHUP |

A signal ends a command and its child processes within two seconds. Artifacts are written beside their destination and renamed when
they are complete, so an interrupted command leaves the old artifact or none. The next run removes what a killed process left.
`pack` keeps the weights that it has copied and continues with them.

With `--json`, an error is also an object on stdout; the exit code stays the same:

```json
{"error": {"type": "MissingDependencyError", "message": "`export` needs torch, ...", "exit_code": 3,
           "packages": ["torch"], "install": "pip install 'foldkv[export]'"}}
```

`type` is a class of `foldkv.errors`, `InternalError`, `Interrupted`, or a class of click for wrong usage. `packages` and `install`
are present if packages are missing or cannot be imported; `path` and `reason` ("ENOSPC") if the operating system refused. A
command that did its work prints its result and no error, even if a gate failed (1) or a target was not built.

Warnings of the loggers `foldkv.*` are shown as `warning: ...`. `-v` before the command shows more: what foldkv is doing,
warnings of packages, and tracebacks. The library prints nothing by itself; give the logger `foldkv` a handler to see its warnings.
Functions that take `progress` call it with one line per step; a `foldkv.progress.Progress` also gets counts and estimates.
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
    ROOT / "docs" / "serving.md": {
        make.__name__: make
        for make in (
            result_tables.clients,
            result_tables.waiting,
            result_tables.reuse,
            result_tables.load,
            result_tables.peer,
        )
    },
    ROOT / "docs" / "results.md": {
        make.__name__: make
        for make in (
            result_tables.decode,
            result_tables.experts,
            result_tables.expert_layer,
            result_tables.e4m3_experts,
            result_tables.matrices,
            result_tables.full_width,
            result_tables.half_real,
            result_tables.half_real_validate,
            result_tables.million,
            result_tables.stages,
            result_tables.real_size,
            result_tables.real_steps,
            result_tables.exports,
        )
    },
}


def made_anew(text: str, makers: dict[str, Callable[[], str]]) -> str:
    """A page with every table between its marks rebuilt.

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
