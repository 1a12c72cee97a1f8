"""Weights in formats that are not read are named, from config.json, files or tensor names, in export and in plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from foldkv.cli import main
from foldkv.errors import CheckpointError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.checkpoint.storage import unread_in_config
from foldkv.export.tensor_table import check_tensors

RELEASED = {
    "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], "activation_scheme": "dynamic"
}  # fmt: skip
CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ", "quant_method is 'awq'"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ", "quant_method is 'gptq'"),
    (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
        "compressed-tensors (nvfp4-pack-quantized)",
        "quant_method",
    ),
    ({"compression_config": {"config_groups": {}}}, "compressed-tensors", "compression_config"),
    ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes", "load_in_4bit"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes", "quant_method"),
    (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        "NVFP4 of NVIDIA ModelOpt",
        "quant_algo",
    ),
    # nvidia/DeepSeek-V4-*-NVFP4: the attention is fp8 as released, the experts are not.
    ({"quantization_config": {**RELEASED, "moe_quant_algo": "NVFP4"}}, "NVFP4 of NVIDIA ModelOpt", "moe_quant_algo"),
    ({"quantization_config": {**RELEASED, "weight_block_size": None}}, "one scale for a whole matrix", "null"),
    ({"quantization_config": {**RELEASED, "fmt": "e5m2"}}, "fp8 in the format e5m2", "fmt"),
    ({"quantization_config": {"quant_method": "brand-new"}}, "'brand-new'", "quant_method"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "MLX", "quantization"),
]


def copy(checkpoint: Path, tmp_path: Path, **change: Any) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, folder / name)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": RELEASED}])
def test_what_is_read_is_not_named(config: dict[str, Any]) -> None:
    assert unread_in_config(config) is None


@pytest.mark.parametrize(("change", "name", "sign"), CONFIGS)
def test_a_quantisation_is_named_from_config_json(
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    name: str,
    sign: str,
) -> None:
    folder = copy(tiny_checkpoint, tmp_path, **change)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    text = str(caught.value)
    assert f"stored as {name}" in text or name in text
    assert sign in text and "missing tensor" not in text and "packed e2m1 experts" in text and "bfloat16" in text
    for path in (
        folder,
        folder / "config.json",
    ):  # the geometry is known all the same, and the warning names the format
        caplog.clear()
        assert spec_from_file(path) == spec_from_file(tiny_checkpoint)
        assert name in caplog.text and sign in caplog.text


def modelopt(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}})
    )


def test_a_quantised_cache_does_not_concern_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_checkpoint, tmp_path)
    table = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": table}))
    check_tensors(Checkpoint(folder))


def only(*names: str) -> Any:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "name", "sign"),
    [
        (modelopt, "NVFP4 of NVIDIA ModelOpt", "hf_quant_config.json"),
        (only("V4-Q4_K_M.gguf"), "GGUF", "V4-Q4_K_M.gguf and no safetensors"),
        (
            only("pytorch_model-1.bin", "pytorch_model-2.bin"),
            "pickled PyTorch weights",
            "pytorch_model-1.bin and 1 more",
        ),
        (only("consolidated.pth"), "pickled PyTorch weights", "consolidated.pth"),
        (only("adapter_model.safetensors"), "an adapter (LoRA) without its model", "adapter_model.safetensors"),
    ],
)
def test_files_that_are_not_read_are_named(
    tiny_checkpoint: Path, tmp_path: Path, spoil: Any, name: str, sign: str
) -> None:
    folder = copy(tiny_checkpoint, tmp_path)
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert f"stored as {name}" in str(caught.value) and sign in str(caught.value)


def test_a_folder_of_gguf_without_config_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "V4-Q4_K_M.gguf"
    file.write_bytes(b"GGUF\x03\x00")
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError, match="stored as GGUF"):
            spec_from_file(path)
    with pytest.raises(CheckpointError, match="stored as GGUF"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("leaf", "name"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_2", "NVFP4 of NVIDIA ModelOpt"),
        ("weight.absmax", "bitsandbytes"),
    ],
)
def test_a_quantisation_is_named_from_its_tensors(tiny_checkpoint: Path, tmp_path: Path, leaf: str, name: str) -> None:
    folder = copy(tiny_checkpoint, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    experts = [key for key in tensors if ".experts." in key and "shared" not in key]
    for key in experts:
        tensors[f"{key.removesuffix('.weight')}.{leaf}"] = torch.zeros(2, 2)
        del tensors[key]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_tensors(Checkpoint(folder))
    assert f"stored as {name}" in str(caught.value) and "missing tensor" not in str(caught.value)


def test_plan_computes_and_export_refuses(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_checkpoint, tmp_path, quantization_config={"quant_method": "awq"})
    result = CliRunner().invoke(main, ["plan", str(folder), "--context", "4k", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["plans"]
    result = CliRunner().invoke(main, ["export", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "stored as AWQ" in result.stderr
