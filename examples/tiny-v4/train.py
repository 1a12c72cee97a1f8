"""Train the tiny DeepSeek-V4: ``python examples/tiny-v4/train.py --minutes 25``.

transformers' own DeepseekV4ForCausalLM is trained, in float32, on source text and on key-value streams.
The indexer gets no gradient through its top-k choice; as in the V4 report it learns from a separate loss,
the cross-entropy of its scores against the attention mass that the entries receive, first with all
entries attended, then with its choice in force. Needs ``transformers`` and ``tokenizers``; writes
config.json, model.safetensors (released tensor names), tokenizer.json and train.log beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stream import RECORD_BYTES, training_stream
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from foldkv.export.checkpoint.names import released_name

HERE = Path(__file__).parent
SEED, BOS, EOS = 20261124, 256, 257
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
CONFIG: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64,
    "partial_rotary_factor": 0.25, "q_lora_rank": 64, "o_groups": 2, "o_lora_rank": 64, "sliding_window": 32,
    "layer_types": [SLIDING, CSA, HCA, CSA], "compress_rates": {CSA: 4, HCA: 32}, "index_n_heads": 8,
    "index_head_dim": 32, "index_topk": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "max_position_embeddings": 1048576, "bos_token_id": BOS, "eos_token_id": EOS,
    "rope_parameters": {"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                        "original_max_position_embeddings": 65536},
    "initializer_range": 0.06,
}  # fmt: skip


def corpus() -> tuple[bytes, bytes]:
    """Training and held-out text: the standard library's sources and the system's licence texts."""
    folders = [Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share/common-licenses")]
    files = sorted(f for folder in folders if folder.is_dir() for f in folder.glob("*") if f.is_file())
    texts = [f.read_bytes() for f in files if f.suffix in (".py", "")]
    held_out = b"".join(text for i, text in enumerate(texts) if i % 17 == 5)
    return b"".join(text for i, text in enumerate(texts) if i % 17 != 5), held_out


def batch(rng: random.Random, text: bytes, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids [rows, length] and the weight of predicting each: text in odd rows but 1, streams in the others."""
    ids, weights = [], []
    for row in range(rows):
        if row % 2 and row != 1:
            at = rng.randrange(len(text) - length)
            ids.append([BOS, *text[at : at + length - 1]])
            weights.append([1.0] * length)
        else:
            stream, known = training_stream(rng, length // RECORD_BYTES)
            ids.append(list(stream.encode()))
            weights.append([4.0 if k else 0.1 for k in known])
    return torch.tensor(ids), torch.tensor(weights)


class IndexerLoss:
    """Collects each CSA layer's index scores and attention mass, and gives the loss between them."""

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.layers = [layer.self_attn for layer in model.model.layers if layer.self_attn.layer_type == CSA]
        self.scores: list[Tensor] = []
        self.mass: list[Tensor] = []
        for attention in self.layers:
            indexer = attention.compressor.indexer
            # Its own loss is all that trains the indexer, and trains nothing else.
            indexer.register_forward_pre_hook(lambda _, args: (args[0].detach(), args[1].detach(), *args[2:]))
            indexer.scorer.register_forward_hook(lambda _, __, out: self.scores.append(out))
            attention.register_forward_hook(lambda _, __, out: self.mass.append(out[1].detach().sum(dim=1)))

    def topk(self, count: int) -> None:
        for attention in self.layers:
            attention.compressor.indexer.index_topk = count

    def take(self) -> Tensor:
        total = torch.zeros(())
        for scores, mass in zip(self.scores, self.mass, strict=True):
            entries = scores.shape[-1]
            target = mass[..., -entries:]
            visible = torch.arange(entries) < (torch.arange(scores.shape[1])[:, None] + 1) // 4
            logq = scores.masked_fill(~visible, -1e9).log_softmax(dim=-1)
            share = target.sum(dim=-1, keepdim=True)
            total = total - (target * logq).sum() / share.sum().clamp(min=1e-6)
        self.scores.clear()
        self.mass.clear()
        return total


def balance(model: DeepseekV4ForCausalLM) -> None:
    """Nudge each router's bias towards an even load, as the V4 report does instead of a loss."""
    for layer in model.model.layers:
        gate = layer.mlp.gate
        if hasattr(gate, "e_score_correction_bias"):

            def nudge(module: Any, _: Any, out: Any) -> None:
                if module.training:
                    load = torch.bincount(out[2].flatten(), minlength=module.num_experts).float()
                    module.e_score_correction_bias += 0.002 * (load.mean() - load).sign()

            gate.register_forward_hook(nudge)


def make_model() -> DeepseekV4ForCausalLM:
    torch.manual_seed(SEED)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**CONFIG, attn_implementation="eager")).float()
    table = model.model.layers[0].mlp.gate.tid2eid
    for token in range(table.shape[0]):  # balanced: consecutive tokens take consecutive pairs
        table[token] = torch.tensor([token % 8, (token + 1 + token // 8 % 7) % 8])
    return model


def save(model: DeepseekV4ForCausalLM, folder: Path) -> None:
    """config.json, weights under the released names, tokenizer."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {released_name(name): value for name, value in load_file(path).items()}
    tensors = {name: value.to(_storage_type(name, value)).clone() for name, value in tensors.items()}
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def _storage_type(name: str, value: Tensor) -> torch.dtype:
    """As released: matrices in bfloat16, hyper-connections, position biases and vectors in float32."""
    if not value.is_floating_point() or value.dim() < 2 or "hc_" in name or name.endswith(".ape"):
        return value.dtype
    return torch.bfloat16


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    rng = random.Random(SEED)
    text, _ = corpus()
    model = make_model()
    balance(model)
    index_loss = IndexerLoss(model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
                                  lr=options.lr, betas=(0.9, 0.98))  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    start, step = time.monotonic(), 0
    log = (options.out / "train.log").open("w")
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "seed": SEED,
                      "text_bytes": len(text), **vars(options) | {"out": None}}), file=log)  # fmt: skip
    totals: dict[str, float] = {}
    while (spent := (time.monotonic() - start) / 60 / options.minutes) < 1:
        # The choice of the indexer comes into force once it has learnt what attention looks at.
        index_loss.topk(10**6 if spent < 0.5 else CONFIG["index_topk"])
        rate = min(1.0, (step + 1) / 50) * (
            1.0 if spent < 0.6 else 0.02 + 0.98 * (1 + math.cos(math.pi * (spent - 0.6) / 0.4)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        # Every eighth step is few and long sequences, so that far positions are seen too.
        long = step % 8 == 7
        ids, weights = batch(
            rng, text, options.rows // 4 if long else options.rows, options.length * (4 if long else 1)
        )
        model.train()
        logits = model(input_ids=ids, use_cache=False).logits
        each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        each = each.view(ids.shape[0], -1)
        w = weights[:, 1:]
        indexed = index_loss.take()
        loss = (each * w).sum() / w.sum() + 0.1 * indexed
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        known = w == 4.0
        right = logits[:, :-1].argmax(-1) == ids[:, 1:]
        now = {"text_bits": each[3::2].mean().item() / math.log(2) if not long else totals.get("text_bits", 8.0), "value_accuracy": right[known].float().mean().item(),
               "value_bits": each[known].mean().item() / math.log(2), "indexer": indexed.item()}  # fmt: skip
        for key, value in now.items():
            totals[key] = totals.get(key, value) * 0.95 + value * 0.05
        if step % 20 == 0:
            line = {
                "step": step,
                "minutes": round((time.monotonic() - start) / 60, 2),
                **{k: round(v, 4) for k, v in totals.items()},
            }
            print(json.dumps(line), file=log, flush=True)
        if step % 200 == 0:
            save(model, options.out)
    save(model, options.out)
    print(json.dumps({"step": step, "done": True}), file=log)
    log.close()


if __name__ == "__main__":
    sys.exit(main())
