"""The whole model through the kernels in torch: rehearsed on the CPU, and device by device without one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kit
import prepare_model as prepared
import pytest
import step_model
import torch
from cases import FORMS, ROTARY, make_case
from checkpoints import random_checkpoint
from driver import FakeDriver
from prepare_model import Setup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foldkv.errors import FoldkvError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.profiles import HF, SERVED
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.operators import attention, index
from foldkv.export.operators.registry import operators
from foldkv.plugins.cuda import KernelImage, Launcher, device_capability
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.model import EXPERT_FORMS
from foldkv.plugins.plans import Kernel, Plan
from foldkv.plugins.torch_ops import KernelOperators, LaunchPlan, new_state, use, use_kernels

pytestmark = pytest.mark.slow

SM = 90
#: Small enough for the interpreter: every kind of layer, windows that close in either.
SMALL = {
    "num_hidden_layers": 3, "sliding_window": 4, "index_topk": 2, "vocab_size": 258,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
}  # fmt: skip


def stand_in(kernels: Sequence[Kernel]) -> tuple[LaunchPlan, FakeDriver]:
    """What enqueues plans on a driver whose device is this process, through the launcher."""
    driver = FakeDriver({kernel.name.encode(): kernel for kernel in kernels})
    images = [KernelImage(one.name, "entry", 32 * one.num_warps, 0, one.name.encode()) for one in kernels]
    launcher = Launcher(images, driver=driver)

    def launch(steps: Plan, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Tensor | None) -> None:
        scratch = torch.zeros(1) if workspace is None else workspace
        driver.memory.clear()
        addresses = [[driver.register(tensor) for tensor in tensors] for tensors in (inputs, outputs, [scratch])]
        launcher.launch(steps, addresses[0], addresses[1], workspace=addresses[2][0])

    return launch, driver


@pytest.fixture(scope="module")
def setup(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A model with random weights; its sequences end at different places, one of them in the first chunk."""
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | SMALL
    folder = random_checkpoint(config, tmp_path_factory.mktemp("model") / "checkpoint", "plain")
    return Setup(folder, lengths=(4, 3), chunk=2, steps=1, context=32)


@pytest.fixture(scope="module")
def parcel(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parcel")
    prepared.prepare(folder, lambda _: None, setup)
    return folder


def test_the_step_of_the_whole_model_in_the_interpreter(setup: Setup, parcel: Path) -> None:
    """All that the GPU's step does but the GPU, with packed rows: the bounds hold and every operator was launched."""
    form = prepared.FORMS[-1]
    launch, driver = stand_in(form.kernels(setup.spec, SM))
    row, wrong = step_model.one_form(parcel, form, launch, device="cpu", sm=SM, setup=setup)
    assert wrong == [] and set(row["operator_calls"]) <= set(PLUGINS)
    assert row["finite"] and len(driver.launches) == sum(row["kernel_launches"].values())
    assert row["agreed"] == [setup.steps] * len(setup.lengths)


@pytest.mark.parametrize(("operator", "rows"), [form for form in FORMS if form[0] not in EXPERT_FORMS])
def test_torchs_operator_launches_the_kernel_and_changes_no_input(operator: str, rows: str) -> None:
    case = make_case(operator, rows, start=[43, 7], real=[1, 1], chunk=1)
    wanted: list[Kernel] = []

    def launch(steps: Plan, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Tensor | None) -> None:
        assert all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in (*inputs, *outputs))
        wanted.extend(one.kernel for one in steps.launches)
        stand_in(wanted)[0](steps, inputs, outputs, workspace)

    kernels = KernelOperators(launch, 80, ROTARY)
    inputs = [_shifted(value, 1 + index % 2) for index, value in enumerate(case.inputs)]
    assert any(value.data_ptr() % 16 for value in inputs)
    before = [value.clone() for value in inputs]
    values = [case.attributes[name] for name in PLUGINS[operator].attributes]
    with use_kernels(kernels, "cpu"):
        found = operators()[operator].torch_op(*inputs, *values)
    case.check([found] if isinstance(found, Tensor) else list(found))
    assert kernels.calls == {operator: 1} and set(kernels.launches) == {kernel.name for kernel in wanted}
    for one, two in zip(before, inputs, strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


def _shifted(value: Tensor, step: int) -> Tensor:
    """Equal values in a view that starts one element in and takes every ``step``-th one: misaligned, or not contiguous too."""
    wide = torch.zeros(step * value.numel() + 1, dtype=value.dtype)
    view = wide[1::step].view(value.shape) if value.numel() else value
    view.copy_(value)
    return view


def test_outside_of_the_context_the_definition_runs() -> None:
    calls = []

    def other(x: Tensor) -> Tensor:
        calls.append("other")
        return x + 1

    quantize = operators()["FoldkvQuantizeFp4"].torch_op
    x = torch.randn(3, 32)
    expected = quantize(x)
    with use({"FoldkvQuantizeFp4": other}, "cpu"):
        assert torch.equal(quantize(x), x + 1)
        with use({}, "cpu"):  # what it does not name stays
            assert torch.equal(quantize(x), x + 1)
    assert torch.equal(quantize(x), expected) and calls == ["other"] * 2


def test_rows_that_no_kernel_reads_are_refused() -> None:
    launch, _ = stand_in([])
    kernels = KernelOperators(launch, SM, ROTARY)
    tail = [torch.zeros(1, dtype=torch.int32)] * 2
    with use_kernels(kernels, "cpu"):
        update = operators()["FoldkvWindowUpdate"].torch_op
        with pytest.raises(ValueError, match="rows of 77 bytes for 64 channels are in a format that it does not read"):
            update(torch.zeros(1, 16, 77, dtype=torch.int8), torch.zeros(1, 1, 64), *tail)
        with pytest.raises(ValueError, match=r"rows of the state are torch\.float64"):
            update(torch.zeros(1, 16, 64, dtype=torch.float64), torch.zeros(1, 1, 64), *tail)
        with pytest.raises(ValueError, match=r"FoldkvWindowUpdate\.kv is torch\.bfloat16; expected float32"):
            update(torch.zeros(1, 16, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 64, dtype=torch.bfloat16), *tail)
        with pytest.raises(FoldkvError, match="is not among those loaded"):
            update(torch.zeros(1, 16, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 64), *tail)


# Without a GPU, torch still tells where a CPU tensor meets one of another device: "meta", which has no values.


class Definitions(TorchDispatchMode):
    """Lets foldkv's operators run their definitions, on meta tensors too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for operator in operators().values():
            if func is operator.torch_op:
                return operator.eager(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("profile", [HF, SERVED])
def test_the_model_computes_where_its_inputs_are(
    profile: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, index):  # a number is read off a tensor, which one without values does not have
        monkeypatch.setattr(module, "active_entries", lambda context, capacity, ratio: capacity)
    decoder = decoder_from_checkpoint(Checkpoint(tiny_checkpoint), profile).to("meta")
    state = new_state(decoder.spec, 64, 2, layout="dense", dtype=torch.bfloat16, device="meta")
    positions = torch.empty(2, dtype=torch.int32, device="meta")
    wide = {name: torch.empty(shape, dtype=torch.int64, device="meta")
            for name, shape in {"ids": (2, 5), "context": (1,), "kept": (2, 3)}.items()}  # fmt: skip
    with torch.no_grad(), Definitions():
        logits, after = decoder(wide["ids"], positions, positions, wide["context"], wide["kept"], state)
    assert logits.device.type == "meta" and logits.shape == (2, 3, 258)
    assert [(t.shape, t.dtype, t.device) for t in after] == [(t.shape, t.dtype, t.device) for t in state]


# What decides on a GPU whether a run passes.


def test_a_result_beyond_its_bound_is_told() -> None:
    def far(*quantiles: float) -> prepared.Distance:
        return prepared.Distance(*quantiles, rms=1.0, kl=1.0, largest=9.0, same_top=1.0)

    yardsticks = {"float32": far(0.1, 0.1, 0.1), "kernels": far(1.0, 2.0, 3.0), "bfloat16": far(5.0, 5.0, 5.0)}
    limits = prepared.bounds(yardsticks, ["float32", "kernels"])
    assert limits == pytest.approx({"median": 3.3, "p90": 5.0, "p99": 5.0})
    assert prepared.beyond(far(3.2, 4.9, 4.9), limits) == []
    assert len(prepared.beyond(far(3.4, 5.1, 5.1), limits)) == 3
    assert len(prepared.beyond(far(*[float("nan")] * 3), limits)) == 3


def test_the_choice_of_another_token_is_told_with_how_near_it_was() -> None:
    logits = torch.tensor([[[0.0, 1.0, 0.9], [0.0, 1.0, -2.0]], [[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]]])
    reference = prepared.Run(logits[:, 0], logits, torch.tensor([[0, 1], [0, 0]]))
    told = step_model.freely(logits, torch.tensor([[0, 2], [0, 0]]), reference, 0.1)
    assert told["agreed"] == [1, 2] and told["gaps"] == pytest.approx([0.1]) and told["near_ties"] == [True]


def test_a_form_that_breaks_off_is_a_row(setup: Setup, parcel: Path, tmp_path: Path) -> None:
    def launch(*_: Any) -> None:
        raise FoldkvError("the CUDA driver failed: CUDA_ERROR_ILLEGAL_ADDRESS")

    record = kit.Recorder(tmp_path / "model.json", "model", step_model.WHAT)
    step_model.forms(record, parcel, launch, device="cpu", sm=SM, setup=setup)
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert len(rows) == len(prepared.FORMS) and all("ILLEGAL_ADDRESS" in row["failure"] for row in rows)


@pytest.mark.skipif(device_capability() is not None, reason="there is a driver")
def test_rounding_in_torch_is_compared_bit_by_bit(tmp_path: Path) -> None:
    record = kit.Recorder(tmp_path / "model.json", "model", step_model.WHAT)
    step_model.rounding(record, "cpu")
    assert [row["unequal"] for row in record.content["rows"]] == [0, 0]
