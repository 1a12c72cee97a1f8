"""The whole tiny-v4 on a GPU in torch, with our kernels: ``python benchmarks/gpu/step_model.py -o OUT/model.json``.

Every operator that touches compressed KV launches its kernel, the rest of export/model is torch's own in float32. A row per
form of the state: the logits of the reference's tokens beside the CPU's, and 200 tokens that follow freely. What is compared
and where the bounds come from is described in prepare_model.py, which makes the references without a GPU.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import kit
import prepare_model as prepared
import torch
from prepare_model import FORMS, SETUP, Form, Run, Setup, Texts
from torch import Tensor

from foldkv.export.contract.operators import expected_operators
from foldkv.export.model.decoder import Decoder
from foldkv.export.operators.quantize import quantized_fp4, quantized_fp8
from foldkv.plugins.compile import compile_kernels
from foldkv.plugins.cuda import Launcher, cuda_driver, device_capability
from foldkv.plugins.torch_ops import KernelOperators, LaunchPlan, launched_by, new_state, use_kernels

WHAT = "tiny-v4 whole in torch, its operators through our kernels, against the CPU in float32"
WARM = 10  # decode steps before time is taken


def forms(
    record: kit.Recorder,
    folder: Path,
    launch: LaunchPlan,
    *,
    device: str,
    sm: int,
    wanted: Sequence[Form] = FORMS,
    setup: Setup = SETUP,
) -> None:
    """A row for every form; one that breaks off is a row too, and the others follow.

    Args:
        record: of the step.
        folder: of the parcel.
        launch: enqueues plans on ``device``.
        device: "cuda", or "cpu" to rehearse.
        sm: compute capability of the kernels.
        wanted: forms.
        setup: what runs, the same as was prepared.
    """
    for form in wanted:
        try:
            row, wrong = one_form(folder, form, launch, device=device, sm=sm, setup=setup)
        except Exception as error:  # noqa: BLE001 - whatever a kernel does
            traceback.print_exc()
            row, wrong = {"form": form.name}, [f"broke off: {type(error).__name__}: {error}"]
        record.add(row, failure=f"{form.name}: {'; '.join(wrong)}" if wrong else "")


def one_form(
    folder: Path, form: Form, launch: LaunchPlan, *, device: str, sm: int, setup: Setup
) -> tuple[dict[str, Any], list[str]]:
    """The row of a form, and which checks do not hold."""
    given, reference = prepared.read(folder / "model" / f"{form.profile}.safetensors")
    yardsticks = prepared.read_yardsticks(folder, form.profile)
    decoder = setup.decoder(form.profile).to(device)
    batch, steps = reference.tokens.shape
    # The first half of the batch is given the reference's tokens, the second half chooses its own.
    both = Texts(given.ids.repeat(2, 1).to(device), given.lengths.repeat(2).to(device))
    forced = torch.cat((reference.tokens, torch.full_like(reference.tokens, -1))).to(device)
    dtype = getattr(torch, form.dtype)
    state = new_state(decoder.spec, setup.context, 2 * batch, layout=form.layout, dtype=dtype, device=device)
    kernels = KernelOperators(launch, sm, decoder.spec.rope_dim)
    forwards = Counting(decoder)
    times: dict[int, float] = {}

    def each_step(step: int) -> None:
        if step in (0, min(WARM, steps // 2), steps):
            if device == "cuda":
                torch.cuda.synchronize()
            times[step] = time.perf_counter()

    begun = time.perf_counter()
    with use_kernels(kernels, device):
        run = prepared.drive(decoder, both, state, steps, forced=forced, chunk=setup.chunk, each_step=each_step)
    warm = sorted(times)[1]
    here = [tensor.cpu() for tensor in (run.prefill, run.decode, run.tokens)]
    split = len(here[0]) // 2  # a run's tokens of the texts are sequence by sequence
    taught = Run(here[0][:split], here[1][:batch], here[2][:batch])
    far = prepared.distance(taught.logits(), reference.logits())
    limits = prepared.bounds(yardsticks, form.yardsticks)
    wrong = prepared.beyond(far, limits)
    wrong += not_called(kernels, form, decoder, forwards.count)
    possible = {kernel.name for kernel in form.kernels(decoder.spec, sm)}
    row: dict[str, Any] = {
        "form": form.name, "profile": form.profile, "layout": form.layout, "dtype": form.dtype,
        "distance": asdict(far), "bounds": limits, "within": not wrong,
        "yardsticks": {name: asdict(value) for name, value in yardsticks.items()},
        "distance_prefill": asdict(prepared.distance(taught.prefill, reference.prefill)),
        "halves_alike": bool(torch.equal(here[0][:split], here[0][split:])),
        "tokens": len(reference.logits()), **freely(here[1][batch:], here[2][batch:], reference, limits["p99"]),
        "ms_per_step": 1e3 * (times[steps] - times[warm]) / max(1, steps - warm), "sequences": 2 * batch,
        "seconds": time.perf_counter() - begun, "operator_calls": dict(kernels.calls),
        "kernel_launches": dict(kernels.launches), "kernels_not_launched": sorted(possible - set(kernels.launches)),
    }  # fmt: skip
    return row, wrong


class Counting:
    """How often a decoder was run."""

    def __init__(self, decoder: Decoder) -> None:
        self.count = 0
        decoder.register_forward_hook(self._ran)

    def _ran(self, *_: Any) -> None:
        self.count += 1


def not_called(kernels: KernelOperators, form: Form, decoder: Decoder, forwards: int) -> list[str]:
    """What shows that something else than the kernels computed: calls that are missing."""
    expected = {
        name: count * forwards
        for name, count in expected_operators(decoder.spec, form.profile).items()
        if name in kernels.implementations()
    }
    if dict(kernels.calls) == expected:
        return []
    return [f"kernels stood in for {dict(sorted(kernels.calls.items()))} calls; expected {expected}"]


def freely(logits: Tensor, tokens: Tensor, reference: Run, bound: float) -> dict[str, Any]:
    """How the tokens that were chosen freely compare with the reference's.

    logits [B, steps, V] and tokens [B, steps] of the free half. Up to the first other token both had the same text, so that
    there the reference's logits say how near the choice was: ``gaps`` is by how much it held the other token for less
    likely. Where that is below twice the bound of 99 % of the tokens, both logits moved and it is a near tie.
    """
    agreed, gaps = [], []
    for sequence, own in enumerate(tokens):
        other = (own != reference.tokens[sequence]).nonzero()
        agreed.append(int(other[0]) if len(other) else len(own))
        if len(other) and agreed[-1]:
            wanted = reference.decode[sequence, agreed[-1] - 1]
            gaps.append(float(wanted.max() - wanted[own[agreed[-1]]]))
    return {
        "agreed_of": tokens.shape[1], "agreed": agreed, "gaps": gaps,
        "near_ties": [gap <= 2 * bound for gap in gaps], "finite": bool(logits.isfinite().all()),
    }  # fmt: skip


def rounding(record: kit.Recorder, device: str) -> None:
    """The profile ``served`` rounds rows in torch too: the device must give the CPU's bits."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 4096)[:, None]
    functions: dict[str, Callable[[Tensor], Tensor]] = {"fp8": lambda v: quantized_fp8(v, 16), "fp4": quantized_fp4}
    for name, quantized in functions.items():
        unequal = int((quantized(x.to(device)).cpu() != quantized(x)).sum())
        record.add(
            {"form": f"rounding to {name} in torch", "unequal": unequal, "of": x.numel()},
            failure=f"rounding to {name}: {unequal} values of {x.numel()} are not the CPU's" if unequal else "",
        )


def captured(record: kit.Recorder, folder: Path, form: Form, launch: LaunchPlan, sm: int) -> None:
    """A decode step as a CUDA graph, which shows that launching waits for nothing: the same bits as without."""
    failure = ""
    row: dict[str, Any] = {"form": f"{form.name}, one decode step as a CUDA graph"}
    try:
        given, reference = prepared.read(folder / "model" / f"{form.profile}.safetensors")
        decoder = SETUP.decoder(form.profile).to("cuda")
        batch = len(given.lengths)
        dtype = getattr(torch, form.dtype)
        state = new_state(decoder.spec, SETUP.context, batch, layout=form.layout, dtype=dtype, device="cuda")
        options: dict[str, Any] = {"device": "cuda"}
        inputs = (
            reference.tokens[:, :1].cuda(), torch.full((batch,), 700, dtype=torch.int32, **options),
            torch.ones(batch, dtype=torch.int32, **options), torch.tensor([701], **options),
            torch.zeros(batch, 1, dtype=torch.int64, **options), state,
        )  # fmt: skip
        with torch.no_grad(), use_kernels(KernelOperators(launch, sm, decoder.spec.rope_dim)):
            side = torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                for _ in range(3):
                    expected, _ = decoder(*inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits, _ = decoder(*inputs)
            graph.replay()
            torch.cuda.synchronize()
            row |= {"captured": True, "same_bits": bool(torch.equal(logits, expected)), "sequences": batch}
            failure = "" if row["same_bits"] else "a captured step gives other bits than its launches"
            begun = time.perf_counter()
            for _ in range(50):
                graph.replay()
            torch.cuda.synchronize()
            row["ms_per_step"] = 1e3 * (time.perf_counter() - begun) / 50
    except Exception as error:  # noqa: BLE001 - whatever a capture does
        traceback.print_exc()
        failure = f"a step cannot be captured: {type(error).__name__}: {error}"[:500]
        row |= {"captured": False}
    record.add(row, failure=failure)


def exact_products() -> None:
    """Products of float32 in float32: not in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Result file.")
def main(output: Path) -> None:
    """Run the whole model."""
    with kit.recorded(output, "model", WHAT) as record:
        folder, sm = kit.parcel(), device_capability() or 90  # without a GPU, in a rehearsal, what the parcel is for
        record.fact(sm=sm, forms=[form.name for form in FORMS])
        compiled = compile_kernels([(kernel, sm) for kernel in prepared.kernels_needed(sm)], cache=folder)
        for form in FORMS:  # what can fail without a GPU fails before one is asked for
            prepared.read(folder / "model" / f"{form.profile}.safetensors")
            prepared.bounds(prepared.read_yardsticks(folder, form.profile), form.yardsticks)
            new_state(SETUP.decoder(form.profile).spec, 1, 1, layout=form.layout, dtype=torch.float32, device="cpu")
        cuda_driver()
        exact_products()
        torch.zeros(1, device="cuda")  # makes the context that the launcher loads into
        record.fact(device=torch.cuda.get_device_name())
        launcher = Launcher(map(kit.image, compiled))
        launch = launched_by(launcher)
        rounding(record, "cuda")
        forms(record, folder, launch, device="cuda", sm=sm)
        captured(record, folder, FORMS[1], launch, sm)


if __name__ == "__main__":
    main()
