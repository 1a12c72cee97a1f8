"""What the step of the whole model is measured by: made on the CPU, in float32, from examples/tiny-v4.

Six texts of different lengths go through the model at once, in chunks, and 200 tokens follow greedily; their logits and
tokens are the reference. The bounds come from the same tokens run again on the CPU with known roundings:

``float32``  the whole model in float64, in other chunks: what the reference itself lost by computing in float32;
``kernels``  float32, but rounded where the kernels round: rows of the state, queries and weights of the softmax;
``bfloat16`` PyTorch's own autocast with rows in bfloat16: what one gets who uses no kernel of ours.

A GPU that runs the kernels is as far from the reference as the yardsticks of its roundings, give or take which of them fall
together: a sum in another order moves a value by float32's rounding, which seldom moves one across a rounding of bfloat16,
and in the profile ``served`` across one of fp8 or fp4. So a run with float32 rows may be `MARGIN` times as far as
``float32``, one with bfloat16 or packed rows `MARGIN` times as far as ``float32`` and ``kernels`` together, and every run
must be nearer to the reference than ``bfloat16``. The margin is 3: two independent errors of one size add to 1.4 of it, a
GPU's exponentials and sines may err by as much again, and the rest is left for chance.

What is bounded is each token's largest difference of a logit: its median, and what 90 and 99 % of the tokens do not exceed.
The model chooses, and where two entries or two experts score almost alike a rounding chooses the other and that token's
logits jump, in the yardsticks as on the GPU. Means and the largest difference are such jumps, and are only told.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.geometry import ModelSpec
from foldkv.export.contract.profiles import HF, SERVED
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.model.decoder import Decoder
from foldkv.export.operators import attention
from foldkv.plugins.model import model_kernels
from foldkv.plugins.plans import Kernel
from foldkv.plugins.torch_ops import new_state

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-v4"
MARGIN = 3.0
BOUNDED = ("median", "p90", "p99")
BOS = 256


@dataclass(frozen=True)
class Setup:
    """What runs.

    Attributes:
        checkpoint: folder of the model.
        lengths: of the texts, tokens.
        chunk: tokens of the texts that are fed at once.
        steps: tokens after them.
        context: tokens that the GPU's state has room for: so many that a decode step parts its entries among programs,
            to choose from them and to attend to them. The CPU's has no more than it needs, which changes no value.
    """

    checkpoint: Path = CHECKPOINT
    lengths: tuple[int, ...] = (610, 457, 300, 211, 90, 33)
    chunk: int = 64
    steps: int = 200
    context: int = 32768

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return spec_from_file(self.checkpoint)

    @property
    def needed(self) -> int:
        """Tokens of the longest sequence at the end."""
        return max(self.lengths) + self.steps

    def decoder(self, profile: str) -> Decoder:
        """The model in float32 on the CPU."""
        return decoder_from_checkpoint(Checkpoint(self.checkpoint), profile)


SETUP = Setup()


@dataclass(frozen=True)
class Form:
    """A way to keep the state while the model runs, and the yardsticks that bound it."""

    profile: str
    layout: str
    dtype: str
    yardsticks: tuple[str, ...]

    @property
    def name(self) -> str:
        """As results name it."""
        return f"{self.profile}, {self.dtype if self.layout == 'dense' else self.layout} rows"

    def kernels(self, spec: ModelSpec, sm: int = 90) -> list[Kernel]:
        """Every kernel that it can launch."""
        return model_kernels(spec, sm=sm, dtype=self.dtype, layout=self.layout, profile=self.profile)


#: What is run on the GPU. Rows in float32 are no form of an engine: they show the kernels without their roundings.
FORMS = (
    Form(HF, "dense", "float32", ("float32",)),
    Form(HF, "dense", "bfloat16", ("float32", "kernels")),
    Form(SERVED, "dense", "bfloat16", ("float32", "kernels")),
    Form(SERVED, "fp8+fp4", "bfloat16", ("float32", "kernels")),
)


def kernels_needed(sm: int = 90) -> list[Kernel]:
    """Every kernel that the step of the whole model launches, each once."""
    return list(dict.fromkeys(kernel for form in FORMS for kernel in form.kernels(SETUP.spec, sm)))


@dataclass(frozen=True)
class Texts:
    """Token ids [B, P], padded with zeros to whole chunks, and how many of each are real [B]."""

    ids: Tensor
    lengths: Tensor

    @property
    def real(self) -> Tensor:
        """Which places of ``ids`` are tokens: [B, P] bool."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


@dataclass(frozen=True)
class Run:
    """Logits of every token of the texts [N, V], of every step [B, steps, V], and the token that each step took [B, steps]."""

    prefill: Tensor
    decode: Tensor
    tokens: Tensor

    def logits(self) -> Tensor:
        """All of them as [N + B * steps, V]."""
        return torch.cat((self.prefill, self.decode.flatten(0, 1)))


def texts(lengths: Sequence[int], chunk: int) -> Texts:
    """Key-value streams as the model was trained on, and pieces of this repository's texts, in turns."""
    streams = _module("stream").training_stream
    prose = b"".join((ROOT / name).read_bytes() for name in ("LICENSE", "examples/tiny-v4/train.py"))
    rng = random.Random("whole model")
    rows = []
    for number, length in enumerate(lengths):
        if number % 2:
            text = streams(rng, length)[0].encode()
        else:
            text = prose[(at := rng.randrange(len(prose) - length)) : at + length]
        rows.append([BOS, *text][:length])
    width = -(-max(lengths) // chunk) * chunk
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Texts(ids, torch.tensor([len(row) for row in rows], dtype=torch.int32))


def _module(name: str) -> Any:
    """A module that is beside the checkpoint."""
    sys.path.insert(0, str(CHECKPOINT))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(CHECKPOINT))


@torch.no_grad()
def drive(
    decoder: Decoder,
    given: Texts,
    state: list[Tensor],
    steps: int,
    *,
    chunk: int,
    forced: Tensor | None = None,
    each_step: Callable[[int], None] = lambda _: None,
) -> Run:
    """Feed the texts in chunks, then one token per step and sequence.

    Nothing waits for the device, so a GPU's steps follow each other.

    Args:
        decoder: on the device of everything else, in any floating type.
        given: the texts.
        state: empty, for as many sequences.
        steps: tokens after the texts.
        chunk: tokens of the texts that are fed at once.
        forced: [B, steps] int64, the token of each step, or -1 for the likeliest one.
        each_step: called before every step with its number, and at the end.
    """
    device, batch = given.ids.device, len(given.lengths)
    longest, width = int(given.lengths.max()), given.ids.shape[1]
    offsets = torch.arange(chunk, device=device).expand(batch, -1)
    parts = []
    for start in range(0, longest, chunk):
        ids = given.ids[:, start : start + chunk]
        ids = torch.nn.functional.pad(ids, (0, chunk - ids.shape[1]))
        positions = given.lengths.clamp(max=start)
        count = (given.lengths - positions).clamp(max=chunk)
        active = torch.tensor([min(start + chunk, longest)], device=device)
        logits, state = decoder(ids, positions, count, active, offsets, state)
        parts.append(logits)
    prefill = torch.cat(parts, dim=1)[:, :width]
    last = prefill[torch.arange(batch, device=device), given.lengths.long() - 1]
    one = torch.ones(batch, dtype=torch.int32, device=device)
    place = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    tokens, decoded = [], []
    for step in range(steps):
        each_step(step)
        token = last.argmax(dim=-1)
        if forced is not None:
            token = torch.where(forced[:, step] >= 0, forced[:, step], token)
        active = torch.full((1,), longest + step + 1, device=device)
        logits, state = decoder(token[:, None], given.lengths + step, one, active, place, state)
        last = logits[:, 0]
        tokens.append(token)
        decoded.append(last)
    each_step(steps)
    real = torch.nn.functional.pad(given.real, (0, prefill.shape[1] - width))
    return Run(prefill[real], torch.stack(decoded, dim=1), torch.stack(tokens, dim=1))


@dataclass(frozen=True)
class Distance:
    """How far logits are from the reference's.

    Attributes:
        median: of every token's largest difference.
        p90, p99: of these, what 90 and 99 % do not exceed.
        rms: root mean square of all differences.
        kl: mean divergence from the reference, nats.
        largest: difference of all.
        same_top: share of tokens with the same likeliest next token.
    """

    median: float
    p90: float
    p99: float
    rms: float
    kl: float
    largest: float
    same_top: float


def distance(found: Tensor, reference: Tensor) -> Distance:
    """found, reference [N, V] -> how far ``found`` is; NaN anywhere gives NaN."""
    found, reference = found.double(), reference.double()
    error = (found - reference).abs()
    log, wanted = found.log_softmax(-1), reference.log_softmax(-1)
    kl = (wanted.exp() * (wanted - log)).sum(-1)
    each = error.amax(-1)
    alike = (found.argmax(-1) == reference.argmax(-1)).double().mean()
    quantiles = [float(each.quantile(share)) for share in (0.5, 0.9, 0.99)]
    return Distance(*quantiles, float(error.square().mean().sqrt()), float(kl.mean()), float(error.max()), float(alike))


def bounds(yardsticks: dict[str, Distance], names: Sequence[str]) -> dict[str, float]:
    """What a run may be away from the reference, by measure, see the module's docstring."""
    return {
        measure: min(
            MARGIN * sum(getattr(yardsticks[name], measure) for name in names),
            getattr(yardsticks["bfloat16"], measure),
        )
        for measure in BOUNDED
    }


def beyond(found: Distance, limits: dict[str, float]) -> list[str]:
    """Which bounds do not hold, in words; a NaN holds none."""
    values = {measure: getattr(found, measure) for measure in limits}
    return [
        f"the {measure} of the logits' differences is {values[measure]:.3g}, more than {limit:.3g}"
        for measure, limit in limits.items()
        if not values[measure] <= limit
    ]


def _rounded_attend(q: Tensor, sinks: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``attention._attend`` with the kernels' roundings to bfloat16: queries, and weights before they are normalized."""
    asked, scale = q.bfloat16().to(q.dtype), q.shape[-1] ** -0.5
    logits = [(asked @ keys.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf) for keys, seen in parts]
    sink = sinks[:, None].expand(*q.shape[:3], 1)
    top = torch.cat((*logits, sink), dim=-1).amax(-1, keepdim=True)
    total, out = (sink - top).exp(), torch.zeros_like(q)
    for logit, (keys, _) in zip(logits, parts, strict=True):
        share = (logit - top).exp()
        total = total + share.sum(-1, keepdim=True)
        out = out + share.bfloat16().to(q.dtype) @ keys
    return out / total


@contextlib.contextmanager
def kernel_roundings() -> Iterator[None]:
    """Let the attentions' definitions round as the kernels do."""
    exact = attention._attend
    attention._attend = _rounded_attend
    try:
        yield
    finally:
        attention._attend = exact


def measure_yardsticks(decoder: Decoder, given: Texts, reference: Run, setup: Setup) -> Iterator[tuple[str, Distance]]:
    """The distance of every yardstick from the reference, see the module's docstring."""
    options: dict[str, Any] = {"layout": "dense", "device": "cpu"}

    def far(
        model: Decoder, dtype: torch.dtype, chunk: int = setup.chunk, carries: torch.dtype | None = None
    ) -> Distance:
        state = new_state(model.spec, setup.needed, len(given.lengths), dtype=dtype, **options)
        if carries is not None:
            state = [tensor.to(carries) for tensor in state]
        run = drive(model, given, state, setup.steps, forced=reference.tokens, chunk=chunk)
        return distance(run.logits(), reference.logits())

    with kernel_roundings():
        yield "kernels", far(decoder, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        yield "bfloat16", far(decoder, torch.bfloat16)
    yield "float32", far(decoder.double(), torch.float64, setup.chunk * 3 // 4, torch.float64)
    decoder.float()


def prepare(
    folder: Path,
    progress: Callable[[str], None],
    setup: Setup = SETUP,
    profiles: Sequence[str] = (HF, SERVED),
) -> None:
    """Write the references and the yardsticks to ``folder``/model.

    Args:
        folder: of the parcel.
        progress: called with a line per part.
        setup: what runs.
        profiles: that are run.
    """
    out = folder / "model"
    out.mkdir(parents=True, exist_ok=True)
    yardsticks: dict[str, dict[str, Any]] = {}
    for profile in profiles:
        start = time.monotonic()
        decoder, given = setup.decoder(profile), texts(setup.lengths, setup.chunk)
        batch = len(setup.lengths)
        state = new_state(decoder.spec, setup.needed, batch, layout="dense", dtype=torch.float32, device="cpu")
        reference = drive(decoder, given, state, setup.steps, chunk=setup.chunk)
        write(out / f"{profile}.safetensors", given, reference)
        progress(f"whole model, {profile}: reference in {time.monotonic() - start:.0f} s")
        yardsticks[profile] = {}
        for name, far in measure_yardsticks(decoder, given, reference, setup):
            yardsticks[profile][name] = asdict(far)
            progress(f"whole model, {profile}, {name}: {far}")
    (out / "yardsticks.json").write_text(json.dumps(yardsticks, indent=1) + "\n")


def write(path: Path, given: Texts, reference: Run) -> None:
    """Texts and their reference as one file."""
    tensors = {
        "ids": given.ids.int(), "lengths": given.lengths, "tokens": reference.tokens.int(),
        "prefill": reference.prefill, "decode": reference.decode,
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read(path: Path) -> tuple[Texts, Run]:
    """What :func:`write` wrote."""
    tensors = load_file(path)
    given = Texts(tensors["ids"].long(), tensors["lengths"])
    return given, Run(tensors["prefill"], tensors["decode"], tensors["tokens"].long())


def read_yardsticks(folder: Path, profile: str) -> dict[str, Distance]:
    """The yardsticks of a profile from the parcel."""
    rows = json.loads((folder / "model" / "yardsticks.json").read_text())[profile]
    return {name: Distance(**row) for name, row in rows.items()}


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), lambda line: print(line, flush=True))
