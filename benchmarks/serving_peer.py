"""The engine of onnxruntime-genai beside ours: the same clients and the same lengths, each with the model that it can run.

``python benchmarks/serving_peer.py BUNDLE -o benchmarks/results/serving-peer.json``, with ``pip install onnxruntime-genai==0.18.0``. onnxruntime-genai has no
DeepSeek-V4, so it runs a Llama with random weights of about as many parameters, layers and the same vocabulary, which its own builder makes. A
layer of that is some 20 operators; a layer of V4 has a mixture of experts, compression, an indexer and hyper-connections, 150 operators and their
functions. So tokens a second compare the models as much as the engines; how they grow with the clients compares the engines.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime_genai as genai
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import foldkv
from foldkv.runtime import Model
from foldkv.runtime.serving import Engine, Request

NEW_TOKENS, LENGTHS = 48, (20, 400)


def make_llama(bundle: Path, folder: Path) -> tuple[Path, int]:
    """A Llama with random weights for onnxruntime-genai, and its number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
        max_position_embeddings=4096, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "llama")
    (folder / "llama" / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes())
    (folder / "llama" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder / "llama", "-o", folder / "onnx", "-p", "fp32", "-e", "cpu",
         "-c", folder / "cache"],
        check=True, capture_output=True,
    )  # fmt: skip
    path = folder / "onnx" / "genai_config.json"
    facts = json.loads(path.read_text())
    facts["model"]["eos_token_id"] = [257]
    facts["engine"] = {"static_batching": {"max_batch_size": 32}}
    path.write_text(json.dumps(facts))
    return folder / "onnx", sum(weight.numel() for weight in model.parameters())


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of mixed lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(32, 127, int(length)).tolist() for length in rng.integers(*LENGTHS, count)]


def theirs(engine: Any, count: int, seed: int) -> float:
    """Tokens a second of onnxruntime-genai's engine."""
    buffer, given, left, asked = engine.create_event_buffer(256), 0, count, []
    start = time.perf_counter()
    for prompt in prompts(count, seed):
        request = engine.create_request()
        turn = genai.TurnOptions(request)
        turn.set_do_sample(False)
        turn.set_max_generated_tokens(NEW_TOKENS)
        turn.set_min_generated_tokens(NEW_TOKENS)
        request.begin_turn(np.array(prompt, np.int32), turn)
        asked.append(request)
    flags = genai.EngineEventFlags
    while left:
        for event in engine.run(buffer):
            if event.flags.value & flags.FAILED.value:
                raise click.ClickException(f"onnxruntime-genai failed: {event.error_code}")
            given += bool(event.flags.value & flags.TOKEN.value)
            left -= bool(event.flags.value & flags.TURN_FINISHED.value)
    took = time.perf_counter() - start
    for request in asked:
        request.close()
    assert given == count * NEW_TOKENS
    return given / took


def ours(engine: Engine, count: int, seed: int) -> float:
    """Tokens a second of our engine."""
    start = time.perf_counter()
    waiting = [engine.submit(Request(prompt, NEW_TOKENS, stop_tokens=())) for prompt in prompts(count, seed)]
    given = sum(len(one.result()[0].token_ids) for one in waiting)
    assert given == count * NEW_TOKENS
    return given / (time.perf_counter() - start)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--clients", default="1,8,32", show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(bundle: Path, output: Path, clients: str, rounds: int) -> None:
    """Measure in turns and write the results as JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Model(bundle) as model:
        made, parameters = make_llama(bundle, Path(folder))
        peer = genai.Engine(genai.Model(genai.Config(str(made))))
        for count in (int(one) for one in clients.split(",")):
            with Engine(model, slots=count, context=1024) as engine:
                pairs = [(ours(engine, count, turn), theirs(peer, count, turn)) for turn in range(rounds)]
            mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
            rows.append({"clients": count, "foldkv_tokens_s": mine, "genai_tokens_s": other})
            click.echo(json.dumps(rows[-1]))
    content = {
        "what": "two engines with the same clients, each with the model that it can run; medians",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, 2 processors, shared",
        "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")}
        | {"foldkv": foldkv.__version__},
        "genai_model": f"Llama, 4 layers, {parameters} parameters, random",
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
