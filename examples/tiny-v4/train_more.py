"""Train the tiny DeepSeek-V4 further: ``python examples/tiny-v4/train_more.py --minutes 33``, after ``train.py``.

Begins with the weights beside this file, which ``train.py`` made, and writes them anew; ``train.log`` is continued. Half of the first
phase's batches were streams in which every record began at a multiple of 4. Here streams begin anywhere, and documents with questions
come in the formats of foldkv's cases of behaviour (``questions.py``), so that a fault of the compressed path shows as lost answers of
every kind. Matrices are trained with Muon (``muon.py``), most of the steps in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from muon import Muon
from questions import document
from stream import retrieval_case
from torch import Tensor
from torch.nn import functional
from train import BOS, CONFIG, HERE, SEED, IndexerLoss, balance, corpus, save
from transformers import DeepseekV4ForCausalLM

from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.behaviour_cases import question
from foldkv.validation.cases import split_answer

#: The share of each kind of row; the rest is text.
MIXTURE = {
    "sweep": 0.12, "dense": 0.02, "words": 0.24, "code": 0.16, "clauses": 0.12, "hops": 0.12, "aggregation": 0.07,
}  # fmt: skip
#: Of the few long rows.
LONG_MIXTURE = {"sweep": 0.8}
#: Of a step, whatever the length of its rows.
TOKENS = 2048
#: What predicting a byte counts: of an answer, of the rest of a document, of text.
ANSWER, FORMAT, TEXT = 4.0, 0.1, 1.0
#: Parts of the time: from when on the indexer's choice is in force, the learning rate falls, and steps are in float32.
CHOICE, FALL, FLOAT32 = 0.45, 0.5, 0.9


def batch(
    rng: random.Random, text: bytes, rows: int, length: int, mixture: Mapping[str, float]
) -> tuple[Tensor, Tensor, list[str]]:
    """Token ids [rows, length], the weight of predicting each, and the kind of each row."""
    ids, weights = [], []
    kinds = rng.choices([*mixture, "text"], [*mixture.values(), 1 - sum(mixture.values())], k=rows)
    for kind in kinds:
        if kind == "text":
            at = rng.randrange(len(text) - length)
            ids.append([BOS, *text[at : at + length - 1]])
            weights.append([TEXT] * length)
        else:
            row, answers = document(rng, kind, length)
            ids.append(row)
            # Kinds with short answers would otherwise teach less than those with long ones.
            weight = ANSWER * math.sqrt(64 / max(sum(answers), 4))
            weights.append([weight if answer else FORMAT for answer in answers])
    return torch.tensor(ids), torch.tensor(weights), kinds


class Probe:
    """Cases in the form in which foldkv asks them, from seeds of their own, that the log counts."""

    def __init__(self, count: int = 12) -> None:
        tokenizer = Tokenizer(HERE / "tokenizer.json")
        self.cases: dict[str, list[tuple[list[int], list[int]]]] = {}
        for kind in ("dense", "code", "clauses", "hops", "aggregation"):
            made = [question(kind, f"probe:{number}", tokenizer, 256) for number in range(count)]
            self.cases[kind] = [split_answer(tokenizer, case.prompt, case.answer) for case in made]
        rng = random.Random("probe")
        self.cases["sweep"] = []
        for number in range(count):
            prompt, answer = retrieval_case(rng, rng.choice((16, 64, 128)))
            ids = list((prompt[number % 4 :] + answer).encode())
            self.cases["sweep"].append((ids[:-1], ids[-2:]))

    def count(self, model: DeepseekV4ForCausalLM) -> dict[str, int]:
        """How many of each kind the model answers."""
        model.eval()
        found = {}
        with torch.no_grad():
            for kind, cases in self.cases.items():
                found[kind] = 0
                for fed, answer in cases:
                    best = model(input_ids=torch.tensor([fed]), use_cache=False).logits[0, -len(answer) :].argmax(-1)
                    found[kind] += best.tolist() == answer
        model.train()
        return found


def compile_hyper_connections(model: DeepseekV4ForCausalLM) -> None:
    """Compile what takes most of a step's time. In training, rows of any length are one long row, so one shape is compiled."""
    enter = torch.compile(type(model.model.layers[0].attn_hc).forward)

    @torch.compile
    def leave(post: Tensor, comb: Tensor, out: Tensor, streams: Tensor) -> Tensor:
        return post.unsqueeze(-1) * out.unsqueeze(-2) + (comb.unsqueeze(-1) * streams.unsqueeze(-2)).sum(2)

    def entered(module: Any, streams: Tensor) -> Any:
        if not module.training:
            return type(module).forward(module, streams)
        return [one[0].unflatten(0, streams.shape[:2]) for one in enter(module, streams.flatten(0, 1).unsqueeze(0))]

    def left(training: bool, post: Tensor, comb: Tensor, out: Tensor, streams: Tensor) -> Tensor:
        if not training:
            return post.unsqueeze(-1) * out.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), streams)
        flat = [one.flatten(0, 1).unsqueeze(0) for one in (post, comb, out, streams)]
        return leave(*flat).view(streams.shape)

    def forward(layer: Any, streams: Tensor, input_ids: Tensor | None = None, **others: Any) -> Tensor:
        post, comb, collapsed = entered(layer.attn_hc, streams)
        out, _ = layer.self_attn(layer.input_layernorm(collapsed), **others)
        streams = left(layer.training, post, comb, out, streams)
        post, comb, collapsed = entered(layer.ffn_hc, streams)
        out = layer.mlp(layer.post_attention_layernorm(collapsed), input_ids=input_ids)
        return left(layer.training, post, comb, out, streams)

    for layer in model.model.layers:
        layer.forward = functools.partial(forward, layer)


def optimizers(model: DeepseekV4ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers; AdamW for embeddings, the head, routers, hyper-connections, biases and vectors."""
    apart = ("_hc.", "position_bias", ".gate.weight")
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() > 1 and ".layers." in name and not any(part in name for part in apart)
    }
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    return [
        Muon(matrices.values(), lr=lr, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=33)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED + 2)
    rng = random.Random(SEED + 2)
    text, _ = corpus()
    probe = Probe()
    model = DeepseekV4ForCausalLM.from_pretrained(HERE, dtype=torch.float32, attn_implementation="eager")
    balance(model)
    index_loss = IndexerLoss(model)
    compile_hyper_connections(model)
    steppers = optimizers(model, options.lr)
    options.out.mkdir(parents=True, exist_ok=True)
    start, step = time.monotonic(), 0
    log = (options.out / "train.log").open("a")
    first = {"phase": 3, "seed": SEED + 2, "mixture": MIXTURE, "minutes": options.minutes, "lr": options.lr}
    print(json.dumps(first), file=log, flush=True)
    totals: dict[str, float] = {}
    while (spent := (time.monotonic() - start) / 60 / options.minutes) < 1:
        index_loss.topk(10**6 if spent < CHOICE else CONFIG["index_topk"])
        fall = max(0.0, (spent - FALL) / (1 - FALL))
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * fall)) / 2)
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate
        # Every twelfth step is few and long rows, so that far positions are seen too; others are short at first.
        long = step % 12 == 11
        short = not long and rng.random() < max(0.0, 0.5 - spent)
        length = 1024 if long else 128 if short else 256
        ids, weights, kinds = batch(rng, text, TOKENS // length, length, LONG_MIXTURE if long else MIXTURE)
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spent < FLOAT32):
            logits = model(input_ids=ids, use_cache=False).logits.float()
            indexed = index_loss.take()
        each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        each = each.view(ids.shape[0], -1)
        w = weights[:, 1:]
        loss = (each * w).sum() / w.sum() + 0.1 * indexed
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
        step += 1
        right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).float()
        now = {"indexer": indexed.item()}
        for row, kind in enumerate(kinds):
            if kind == "text" and not long:
                now["text_bits"] = each[row].mean().item() / math.log(2)
            elif kind != "text" and (answers := w[row] > TEXT).any():
                now[f"{kind}{length}"] = right[row][answers].mean().item()
        for key, value in now.items():
            totals[key] = totals.get(key, value) * 0.95 + value * 0.05
        if step % 50 == 0:
            line: dict[str, Any] = {"step": step, "minutes": round((time.monotonic() - start) / 60, 2)}
            line |= {key: round(value, 3) for key, value in sorted(totals.items())}
            if step % 250 == 0:
                line["answers"] = probe.count(model)
                save(model, options.out)
            print(json.dumps(line), file=log, flush=True)
    save(model, options.out)
    print(json.dumps({"step": step, "done": True, "answers": probe.count(model)}), file=log)
    log.close()


if __name__ == "__main__":
    sys.exit(main())
