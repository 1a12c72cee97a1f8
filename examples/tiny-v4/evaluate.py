"""Measure the tiny model: ``python examples/tiny-v4/evaluate.py``; writes metrics.json beside this file.

Bits per byte on held-out text, against an n-gram model fitted on the same training text; retrieval of exact
values by distance, for the whole model and for the same model with its compressed path cut off (every
entry masked, so that only the sliding window is left); and, of both, answers to the cases of behaviour of ``foldkv validate``.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from stream import retrieval_case
from train import BOS, CSA, HCA, corpus
from transformers import DeepseekV4ForCausalLM

from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.behaviour import is_answer
from foldkv.validation.behaviour_cases import KINDS, BehaviourCase, kind_cases, sweep_cases
from foldkv.validation.settings import Plan

HERE = Path(__file__).parent
DISTANCES = (16, 28, 64, 128, 256, 512, 1024, 2048)
CASES, ORDER = 50, 5
#: Cases of each kind of behaviour, and of the sweep at each of its lengths. The first of them are those of ``foldkv validate``.
PER_KIND, PER_LENGTH = 40, 4


def cut_compressed_path(model: Any) -> None:
    """Mask every compressed entry: layers with a compressor see their window and their sink alone."""
    for layer in model.model.layers:
        if layer.self_attn.layer_type in (CSA, HCA):

            def blind(_: Any, __: Any, out: Any) -> Any:
                return out[0], None if out[1] is None else torch.full_like(out[1], -torch.inf)

            layer.self_attn.compressor.register_forward_hook(blind)


def retrieval(model: Any, distance: int) -> float:
    """Share of two-digit values answered exactly, digit by digit the likeliest token."""
    rng = random.Random(f"evaluate:{distance}")
    right = 0
    for _ in range(CASES):
        prompt, answer = retrieval_case(rng, distance)
        ids = list((prompt + answer).encode())
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
        right += best[-3:-1] == ids[-2:]
    return right / CASES


def behaviour_cases(window: int) -> list[tuple[BehaviourCase, bool]]:
    """Cases of all kinds as ``foldkv validate`` makes them by default, and more; whether each is one of its defaults."""
    plan, tokenizer = Plan(), Tokenizer(HERE / "tokenizer.json")

    def made(per_kind: int, per_length: int) -> list[BehaviourCase]:
        sweep = sweep_cases(tokenizer, window, plan.case_tokens, plan.distances, per_length, seed=plan.seed)
        return [*kind_cases(tokenizer, per_kind, plan.case_tokens, seed=plan.seed), *sweep]

    defaults = made(plan.cases_per_kind, plan.sweep_cases)
    return [(case, case in defaults) for case in made(PER_KIND, PER_LENGTH)]


def behaviour(model: Any) -> dict[str, list[int]]:
    """Per kind, and per residue of the sweep: answered, cases, answered of the default cases, default cases."""
    found = {kind: [0, 0, 0, 0] for kind in KINDS}
    for case, default in behaviour_cases(model.config.sliding_window):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([case.tokens]), use_cache=False).logits[0, -len(case.answer) :]
        right = is_answer(case.answer, logits.numpy())
        for row in (case.kind, *(f"{case.kind}, {group}" for group in case.groups[:1])):
            counts = found.setdefault(row, [0, 0, 0, 0])
            for place, value in enumerate((right, True, right and default, default)):
                counts[place] += value
    return found


def bits_per_byte(model: Any, text: bytes, windows: int = 64, length: int = 255) -> float:
    """Mean over windows of held-out text, each from an empty state."""
    rng, total = random.Random(0), 0.0
    for _ in range(windows):
        at = rng.randrange(len(text) - length)
        ids = torch.tensor([[BOS, *text[at : at + length]]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item() / math.log(2)
    return total / windows


def ngram_bits(train: bytes, text: bytes, windows: int = 64, length: int = 255) -> float:
    """Interpolated n-grams up to ORDER bytes (Witten-Bell weights), on the same windows."""
    counts: list[dict[bytes, Counter[int]]] = [{} for _ in range(ORDER)]
    for order in range(ORDER):
        table = counts[order]
        for i in range(order, len(train)):
            table.setdefault(train[i - order : i], Counter())[train[i]] += 1
    totals = [{context: c.total() for context, c in table.items()} for table in counts]
    rng, bits = random.Random(0), 0.0
    for _ in range(windows):
        at = rng.randrange(len(text) - length)
        window = text[at : at + length]
        for i, byte in enumerate(window):
            p = 1 / 256
            for order in range(min(i, ORDER - 1) + 1):
                seen = counts[order].get(window[i - order : i])
                if seen:
                    total, kinds = totals[order][window[i - order : i]], len(seen)
                    p = (seen[byte] + kinds * p) / (total + kinds)
            bits -= math.log2(p)
    return bits / windows / length


def main() -> None:
    train, held_out = corpus()
    model = DeepseekV4ForCausalLM.from_pretrained(HERE, dtype=torch.float32, attn_implementation="eager").eval()
    metrics: dict[str, Any] = {
        "bits_per_byte": bits_per_byte(model, held_out),
        f"bits_per_byte_{ORDER}_gram": ngram_bits(train, held_out),
        "cases_per_distance": CASES,
        "retrieval": {str(distance): retrieval(model, distance) for distance in DISTANCES},
        "behaviour": behaviour(model),
    }
    cut_compressed_path(model)
    metrics["bits_per_byte_window_only"] = bits_per_byte(model, held_out)
    metrics["retrieval_window_only"] = {str(distance): retrieval(model, distance) for distance in DISTANCES}
    metrics["behaviour_window_only"] = behaviour(model)
    (HERE / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
