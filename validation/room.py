"""Whether a validation fits into this machine: its models whole, or what a run that goes a layer at a time holds and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ..backends import FLOAT32
from ..errors import InputError
from ..export.contract.geometry import ModelSpec
from ..export.contract.profiles import SERVED
from ..export.memory import parameter_count, parameter_groups
from ..optimize.fit import machine_memory
from ..runtime.host_memory import available_memory
from ..units import size_text
from .cases import RECORD_BYTES
from .jobs import TOKENS_AT_ONCE
from .layer_weights import GROUP_BYTES
from .layered_files import bytes_below, free_disk, in_memory
from .layered_runner import CHUNK
from .layered_subject import LONGEST
from .long_context import DEPTHS, PER_DEPTH, REFERENCE_CONTEXT
from .settings import Plan

#: Share of the machine's free memory that the references may take, whole.
WHOLE_SHARE = 0.6
#: What libraries, all that is small, and what the allocator does not give back take of a run that goes a layer at a time.
_PROCESS = 2 << 30
#: Tokens of the questions after a long context.
_QUESTIONS = len(DEPTHS) * PER_DEPTH * RECORD_BYTES


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a validation opens, as far as its memory depends on it.

    Attributes:
        spec: the model.
        profile: of the bundle; ``served`` has an oracle.
        precision: of the bundle; bfloat16 has a yardstick.
        gpu: whether the bundle is for a GPU, whose choices are recomputed from the streams of all texts.
        workers: other processes on this machine that open the sides too.
    """

    spec: ModelSpec
    profile: str
    precision: str
    gpu: bool
    workers: int = 0

    @property
    def yardstick(self) -> bool:
        """Whether transformers is opened in bfloat16 too."""
        return self.precision != FLOAT32

    def fits_whole(self, more: int = 0) -> bool:
        """Whether this machine holds the references whole, in every process, and ``more`` bytes a parameter in this one."""
        each = 4 + 4 * (self.profile == SERVED) + 2 * self.yardstick
        size = (each * (1 + self.workers) + more) * parameter_count(self.spec)
        return size <= WHOLE_SHARE * min(machine_memory(), available_memory() or machine_memory())


def layered_memory(opened: Opened, tokens: int, contexts: Sequence[int] = ()) -> int:
    """Bytes that a run which goes a layer at a time takes in each process, beside a bundle's state: the formula of docs/cli.md. Files that are
    mapped are not counted: the system drops them first.

    Args:
        opened: the sides.
        tokens: of the longest text or case.
        contexts: tokens of the long contexts.
    """
    spec = opened.spec
    hidden, heads, inner = spec.hidden_size, spec.num_heads, spec.moe_intermediate_size
    read = [context for context in contexts if context <= REFERENCE_CONTEXT]
    a_pass = max([tokens, TOKENS_AT_ONCE, *read])
    flowing = a_pass * 4 * hidden * (2 * spec.hc_mult + spec.experts_per_token + 3)
    expert = 12 * hidden * inner
    experts = expert + min(max(GROUP_BYTES, expert), spec.num_experts * expert)
    # A text is one chunk; of a long context a chunk attends to its window and all entries.
    chunks = [(tokens, tokens + tokens // _ratio(spec))]
    chunks += [(CHUNK, CHUNK + spec.sliding_window + context // _ratio(spec)) for context in read]
    attention = max(
        4
        * (
            4 * heads * queries * keys
            + heads * spec.head_dim * (5 * queries + 3 * keys)
            + 4 * spec.hc_mult * hidden * queries
        )
        for queries, keys in chunks
    )
    ends = 8 * spec.vocab_size * (hidden + tokens)
    return _PROCESS + flowing + max(5 * _layer_parameters(spec) + experts + attention, ends)


def layered_disk(opened: Opened, plan: Plan, cases: int) -> int:
    """Bytes that such a run writes beside its report until it ends: streams, choices and logits.

    Args:
        opened: the sides.
        plan: says the texts and the long contexts.
        cases: tokens of all cases.
    """
    spec, tokens, layers = opened.spec, plan.text_tokens, opened.spec.num_layers
    stream, references = 4 * spec.hc_mult * spec.hidden_size, 1 + opened.yardstick
    served = opened.profile == SERVED
    looks = plan.texts if opened.gpu else 1
    # Of the first text the reference's streams, each layer's alone, and with a yardstick what that makes of them.
    streams = looks + 2 + opened.yardstick * (1 + served)
    # After the last layer: of texts the bundle's twice and those of its choices, the references', and the oracle's with its deployments.
    after = plan.texts * tokens * (3 + 2 * references + 4 * served) + cases * (2 + served)
    chosen = tokens // _ratio(spec) * 8 + spec.index_topk * 16
    choices = plan.texts * tokens * len(spec.indexed_ratios) * (1 + references) * chosen
    logits = 4 * spec.vocab_size * tokens * (3 + plan.texts * (2 + opened.yardstick))
    # A long context is a pass of its own, in the reference and in a bundle for the cpu, unless it is too long for that.
    readers = {c: (c <= REFERENCE_CONTEXT) + (c <= LONGEST and not opened.gpu) for c in plan.contexts}
    read = {c + _QUESTIONS: count for c, count in readers.items() if count}
    after += sum(context * count for context, count in read.items())
    # A file is replaced when the next one is whole; and a run that goes on has what it began with mapped until the pass is done.
    replaced = 2 * max([TOKENS_AT_ONCE, tokens, *read])
    return (streams * layers * tokens + after + replaced) * stream + choices + logits


def check_layered(opened: Opened, plan: Plan, cases: int, folder: Path) -> None:
    """Refuse a run that goes a layer at a time and would not fit, before it begins.

    Args:
        opened: the sides.
        plan: what is measured.
        cases: tokens of all cases.
        folder: where the run keeps streams. What is there counts as free: the same run goes on with it, and
            :func:`~foldkv.validation.layered_files.begin_run` removes that of another.

    Raises:
        InputError: the memory or the disk has too little room. The message says how long texts may be, or which contexts are too long.
    """
    longest, times = plan.longest(), 1 + opened.workers
    each = f" in {times} processes together" if opened.workers else ""

    def memory(tokens: int, contexts: Sequence[int]) -> int:
        return times * layered_memory(opened, tokens, contexts)

    def disk(tokens: int, contexts: Sequence[int]) -> int:
        return layered_disk(opened, dataclasses.replace(plan, text_tokens=tokens, contexts=tuple(contexts)), cases)

    free, held = available_memory(), memory(longest, plan.contexts)
    if free and held > free:
        texts = "texts and cases of at most {:,} tokens (--text-tokens, --distance, --case-tokens)"
        contexts = f" and contexts of up to {max(plan.contexts):,}" if plan.contexts else ""
        raise InputError(
            f"a validation a layer at a time takes {size_text(held)} of memory with texts and cases of up to {longest:,} "
            f"tokens{contexts}{each}, and {size_text(free)} are free. "
            f"{_step(memory, free, longest, plan.contexts, texts, 'a machine with more memory')}"
        )
    there, written, kind = bytes_below(folder), disk(plan.text_tokens, plan.contexts), in_memory(folder)
    if free and kind and held + written > free + there:
        raise InputError(
            f"a validation a layer at a time takes {size_text(held)} of memory{each} and writes {size_text(written)} to {folder} until "
            f"it ends. That folder is in memory too ({kind}), so it takes {size_text(held + written)}, and {size_text(free + there)} "
            "are free. Name a --report folder on a disk."
        )
    room = free_disk(folder) + there
    if written > room:
        texts = "texts of at most {:,} tokens (--text-tokens), fewer of them (--texts)"
        raise InputError(
            f"a validation a layer at a time writes {size_text(written)} to {folder} until it ends, and "
            f"{size_text(room)} are free. {_step(disk, room, plan.text_tokens, plan.contexts, texts, 'a --report on a larger disk')}"
        )


def _step(
    needs: Callable[[int, Sequence[int]], int], room: int, tokens: int, contexts: Sequence[int], texts: str, other: str
) -> str:
    """What to do where texts of ``tokens`` tokens and long contexts do not fit.

    Args:
        needs: bytes with texts of so many tokens and these contexts.
        room: bytes that there are.
        tokens: of the texts.
        contexts: their tokens.
        texts: words for shorter texts, with a place for the number.
        other: words for what has more room.
    """
    kept = sorted(contexts)
    while kept and needs(2, kept) > room:
        kept.pop()
    most = tokens if needs(tokens, kept) <= room else _most(lambda count: needs(count, kept), room, tokens)
    if not most:
        return f"Give {other}."
    left_out = " ".join(f"--context {context}" for context in sorted(contexts)[len(kept) :])
    shorter = f"give {texts.format(most)}" if most < tokens else ""
    steps = " and ".join([f"leave out {left_out}"] * bool(left_out) + [shorter] * bool(shorter))
    return f"{steps[0].upper()}{steps[1:]}, or {'' if shorter else 'give '}{other}."


def _most(needs: Callable[[int], int], room: int, above: int) -> int:
    """The largest number of tokens below ``above`` that fits; 0 if two do not."""
    low, high = 1, above
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= room else (low, middle)
    return low if low > 1 else 0


def _ratio(spec: ModelSpec) -> int:
    """Tokens of an entry where there are most entries."""
    return min((ratio for ratio in spec.ratios if ratio), default=1 << 62)


def _layer_parameters(spec: ModelSpec) -> int:
    """Of the largest layer, without its routed experts."""
    sizes = []
    for kind, ratio, hashed in set(zip(spec.layer_types, spec.ratios, spec.hash_layers, strict=True)):
        alone = dataclasses.replace(spec, num_layers=1, layer_types=(kind,), ratios=(ratio,), hash_layers=(hashed,))
        groups = parameter_groups(alone)
        sizes.append(groups["projections"] + groups["precise"])
    return max(sizes)
