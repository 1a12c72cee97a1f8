"""The reference for checkpoints that fit into no memory: transformers' layers, one at a time, over all texts.

A layer's tensors are read from the checkpoint and dequantised, all texts go through it, their streams are kept, and it is dropped;
experts come in groups of a given size. So a weight is read once for as many texts as fit beside it, and memory has one layer
without its experts, a group of experts, and the texts.

The computation is that of transformers' own modules, run in two passes over the tokens: attention and routing first, then, when the
chosen experts have answered, the rest. With the same chunks and threads the results are those of the whole model, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..artifact import sha256_json
from ..backends import FLOAT32
from ..export.checkpoint.names import released_name
from ..export.checkpoint.reader import Checkpoint
from ..packages import require
from ..progress import BYTES, Progress, Say, silent
from .environment import computing
from .jobs import Job
from .layer_weights import GROUP_BYTES, LayerWeights
from .layered_files import Kept
from .selection import Selection, mass_of, settle_ties, visible_scores

#: Called with a layer and, for every job, its streams [n, N, C] after it.
Observer = Callable[[int, Sequence[Tensor]], None]


class Layered(Protocol):
    """A model of which one layer is in memory at a time: a reference, or a subject (layered_subject.py)."""

    num_layers: int

    def key(self, jobs: Sequence[Job]) -> str:
        """A digest of everything that the streams of these jobs depend on."""
        ...

    def layer_bytes(self, layer: int) -> int:
        """Bytes of a layer's weights."""
        ...

    def embedded(self, job: Job) -> Tensor:
        """The streams [n, N, C] before the first layer."""
        ...

    def layers(self, jobs: Sequence[Job], streams: Sequence[Tensor], *, first: int = 0) -> Iterator[list[Tensor]]:
        """As :meth:`LayeredReference.layers`."""
        ...


class LayeredReference:
    """transformers' DeepseekV4ForCausalLM, eager, of which one layer is in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, *, precision: str = FLOAT32, group_bytes: int = GROUP_BYTES) -> None:
        """Check the checkpoint's tensors; no weight is read.

        Args:
            checkpoint: the checkpoint, opened.
            precision: float32, or bfloat16 as transformers itself computes in it.
            group_bytes: bytes of float32 weights of experts that are held at once; at least one expert is.

        Raises:
            CheckpointError: tensors are missing, unexpected or of a wrong shape.
            MissingDependencyError: transformers is not installed.
        """
        require("validate")
        self.weights = LayerWeights(checkpoint, group_bytes=group_bytes)
        import transformers
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        self.name = f"transformers {transformers.__version__}, {precision}, layer by layer"
        self.layer_bytes = self.weights.layer_bytes
        self._dtype: torch.dtype = getattr(torch, precision)
        # Parts of names whose tensors stay float32.
        self._kept = set(modeling.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict or ())
        config = transformers.DeepseekV4Config.from_pretrained(checkpoint.folder)
        config._attn_implementation = "eager"
        # What from_pretrained chooses; without it the modules compute experts in another order.
        config._experts_implementation = "grouped_mm"
        self._config = config
        self.num_layers: int = config.num_hidden_layers

    def embedded(self, job: Job) -> Tensor:
        """The streams [n, N, C] before the first layer."""
        table = self._value("embed.weight", "model.embed_tokens.weight")
        rows = torch.nn.functional.embedding(torch.tensor(list(job.tokens)), table)
        return rows[:, None].expand(-1, self._config.hc_mult, -1).contiguous()

    def layers(self, jobs: Sequence[Job], streams: Sequence[Tensor], *, first: int = 0) -> Iterator[list[Tensor]]:
        """The streams of every job after each layer; what else jobs keep is added to them.

        Args:
            jobs: the texts.
            streams: of each, before the layer ``first``: float32 [n, N, C].
            first: the layer to begin with.

        Yields:
            The streams after the next layer, [n, N, C] of every job.

        Raises:
            CheckpointError: a weight cannot be read, or its scale is NaN, infinite or not above zero.
        """
        now = list(streams)
        with torch.no_grad():
            for index in range(first, self.num_layers):
                now = _Layer(self, index).run(jobs, now)
                yield now

    def logits(self, streams: Tensor, rows: slice = slice(None)) -> Tensor:
        """Logits [m, V] float32 of the tokens ``rows`` of a text, from its streams [n, N, C] after the last layer."""
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        with torch.device("meta"):
            mixed, norm = (
                modeling.DeepseekV4HyperHead(self._config),
                modeling.DeepseekV4RMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps),
            )
        self.fill(mixed, "hc_head.")
        self.fill(norm, "norm.")
        with torch.no_grad():
            hidden = norm(mixed(streams[None, rows]))
            return torch.nn.functional.linear(hidden, self._value("head.weight", "lm_head.weight"))[0].float()

    def fill(self, module: torch.nn.Module, prefix: str, without: str = "\0") -> None:
        """Give a module that has no storage the values of the checkpoint, but for names that begin with ``without``."""
        names = [name for name in module.state_dict() if not name.startswith(without)]
        module.load_state_dict(
            {name: self._value(released_name(prefix + name), prefix + name) for name in names},
            strict=False,
            assign=True,
        )

    def experts(self, layer: int, start: int, end: int) -> list[Tensor]:
        """The weights of some experts of a layer: [E, 2 I, C] and [E, C, I]."""
        return [one.to(self._dtype) for one in self.weights.experts(layer, start, end)]

    def _value(self, released: str, name: str) -> Tensor:
        value = self.weights.value(released)
        stays = self._dtype == torch.float32 or not value.is_floating_point() or self._kept & set(name.split("."))
        return value if stays else value.to(self._dtype)

    def key(self, jobs: Sequence[Job]) -> str:
        """A digest of everything that the streams of these jobs depend on; threads, which change the last bits, included."""
        return sha256_json([self.name, self.weights.identity, torch.get_num_threads(), [job.key for job in jobs]])


class _Reached(Exception):
    """The first pass has come to the experts."""


class _Routed(torch.nn.Module):
    """In the place of a layer's experts: notes what they are asked, and answers when that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: tuple[Tensor, Tensor, Tensor] | None = None
        self.answer: Tensor | None = None

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.answer is None:
            self.asked = hidden, chosen, weights
            raise _Reached
        return self.answer


class _Known(torch.nn.Module):
    """In the place of a layer's attention in the second pass: its output from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor | None, None]:
        return self.output, None


@dataclasses.dataclass
class _Piece:
    """What a chunk of a text keeps between the two passes: attention's output, and what its experts are asked and have answered."""

    streams: Tensor
    ids: Tensor
    attention: Tensor
    hidden: Tensor
    chosen: Tensor
    weights: Tensor
    answers: Tensor


class _Layer:
    """One layer of transformers, with its weights but for the experts."""

    def __init__(self, reference: LayeredReference, index: int) -> None:
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        self._reference, self._index, self._modeling = reference, index, modeling
        # A config of this layer alone: transformers' caches and masks count layers from 0.
        config = self._config = copy.deepcopy(reference._config)
        config.num_hidden_layers = 1
        config.layer_types = [reference._config.layer_types[index]]
        config.mlp_layer_types = [reference._config.mlp_layer_types[index]]
        with torch.device("meta"):
            layer = self._layer = modeling.DeepseekV4DecoderLayer(config, 0).eval().requires_grad_(False)
        reference.fill(layer, f"model.layers.{index}.", without="mlp.experts.")
        # Frequencies are in no checkpoint.
        for module in list(layer.modules()):
            if hasattr(module, "rotary_emb"):
                module.rotary_emb = modeling.DeepseekV4RotaryEmbedding(config)
        self._rotary = modeling.DeepseekV4RotaryEmbedding(config)
        layer.mlp.experts = self._routed = _Routed()
        self._attention, self._known = layer.self_attn, _Known()

    def run(self, jobs: Sequence[Job], streams: Sequence[Tensor]) -> list[Tensor]:
        """The streams of every job after the layer."""
        pieces = []
        for job, before in zip(jobs, streams, strict=True):
            given = before
            if job.given is not None and self._index:
                given = torch.from_numpy(job.given[self._index - 1]).to(before.dtype)
            with self._watched(job):
                pieces.append(list(self._until_experts(job, given[None])))
        self._ask([piece for text in pieces for piece in text])
        after = [torch.cat([self._after_experts(piece) for piece in text], dim=1)[0] for text in pieces]
        for job, one in zip(jobs, after, strict=True):
            if job.keep_streams:
                job.streams.append(one.float().numpy())
        return after

    @contextlib.contextmanager
    def _watched(self, job: Job) -> Iterator[None]:
        """Let the layer's indexer choose as a job says, and keep what it chose."""
        indexer = getattr(getattr(self._attention, "compressor", None), "indexer", None)
        if indexer is None or (job.chosen is None and job.given is None):
            yield
            return
        kept: dict[str, Any] = {}

        def swap(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            query, own, *rest = arguments
            keys = (job.keys or {}).get(self._index)
            return (query, own if keys is None else keys[None].to(own.dtype), *rest)

        def choose(module: Any, _: Any, own: Any) -> Any:
            kept["chosen"], kept["tied"] = own[0].numpy(), np.zeros(len(job.tokens), np.bool_)
            preferred = (job.chosen or {}).get(self._index)
            if preferred is None:
                return own
            seen = visible_scores(kept["scores"].numpy(), module.compress_rate)
            kept["chosen"], kept["tied"] = settle_ties(seen, own[0].numpy(), preferred)
            return torch.from_numpy(kept["chosen"])[None]

        hooks = [
            indexer.scorer.register_forward_pre_hook(swap),
            indexer.scorer.register_forward_hook(lambda _, __, out: kept.update(scores=out[0])),
            indexer.register_forward_hook(choose),
            self._attention.register_forward_hook(lambda _, __, out: kept.update(weights=out[1][0])),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if job.given is not None:
            job.entries[self._index] = kept["chosen"]
        if job.chosen is not None:
            # Without a cache the keys are the tokens, then the entries.
            mass = mass_of(kept["weights"][:, :, len(job.tokens) :].float())
            job.selections[self._index] = Selection(kept["chosen"], mass, kept["tied"])

    def _until_experts(self, job: Job, streams: Tensor) -> Iterator[_Piece]:
        """The first pass over a text, a chunk at a time."""
        from transformers.cache_utils import DynamicCache
        from transformers.masking_utils import create_sliding_window_causal_mask

        layer, ids = self._layer, torch.tensor([list(job.tokens)])
        cache = None if job.edges is None else DynamicCache(config=self._config)
        outputs: list[Tensor] = []
        hook = self._attention.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
        layer.self_attn = self._attention
        try:
            for start, end in itertools.pairwise([0, *(job.edges or ()), ids.shape[1]]):
                if start == end:
                    continue
                part, positions = streams[:, start:end], torch.arange(start, end)[None]
                row = part[:, :, 0]  # masks and rotations take its shape and type only
                self._routed.answer = None
                with contextlib.suppress(_Reached):
                    layer(
                        part, input_ids=ids[:, start:end], position_ids=positions, past_key_values=cache,
                        position_embeddings={
                            kind: self._rotary(row, position_ids=positions, layer_type=kind) for kind in ("main", "compress")
                        },
                        attention_mask=create_sliding_window_causal_mask(
                            config=self._config, inputs_embeds=row, attention_mask=None, past_key_values=cache,
                            position_ids=positions,
                        ),
                    )  # fmt: skip
                assert self._routed.asked is not None
                hidden, chosen, weights = self._routed.asked
                answers = torch.empty((*chosen.shape, hidden.shape[-1]), dtype=hidden.dtype)
                yield _Piece(part, ids[:, start:end], outputs.pop(), hidden, chosen, weights, answers)
        finally:
            hook.remove()

    def _ask(self, pieces: Sequence[_Piece]) -> None:
        """Compute what the experts answer, a group of them at a time; those that nobody chose are not read."""
        wanted = {int(expert) for piece in pieces for expert in piece.chosen.flatten().tolist()}
        for start, end in self._reference.weights.groups(wanted):
            self._ask_some(pieces, start, end)

    def _ask_some(self, pieces: Sequence[_Piece], start: int, end: int) -> None:
        config = copy.deepcopy(self._config)
        config.n_routed_experts = end - start
        with torch.device("meta"):
            experts = self._modeling.DeepseekV4Experts(config).eval().requires_grad_(False)
        weights = self._reference.experts(self._index, start, end)
        experts.load_state_dict(dict(zip(("gate_up_proj", "down_proj"), weights, strict=True)), assign=True)
        for piece in pieces:
            token, place = torch.where((piece.chosen >= start) & (piece.chosen < end))
            if len(token):
                # Every pair of a token and an expert is a token of its own here; pairs are added up later, in their places.
                piece.answers[token, place] = experts(
                    piece.hidden[token], piece.chosen[token, place, None] - start, piece.weights[token, place, None]
                )

    def _after_experts(self, piece: _Piece) -> Tensor:
        """The second pass over a chunk: its streams after the layer."""
        layer = self._layer
        self._known.output, self._routed.answer = piece.attention, piece.answers.sum(dim=1)
        layer.self_attn = self._known
        result: Tensor = layer(piece.streams, input_ids=piece.ids)
        return result


def read_layered(
    side: Layered, jobs: Sequence[Job], *, observe: Observer | None = None, folder: Path | None = None,
    progress: Say = silent, pass_: tuple[int, int] = (0, 1),
) -> list[Tensor]:  # fmt: skip
    """The streams [n, N, C] float32 of every job after the last layer.

    Args:
        side: the model.
        jobs: the texts.
        observe: called after every layer, also again for the layer after which an earlier run ended.
        folder: where streams are kept after every layer, and what else jobs keep, so that a run which was interrupted goes on after
            it. Only what is of the same checkpoint and jobs, and was computed by the same packages, is taken. Jobs then have what they keep, and the caller the streams, mapped
            from there: memory has what flows into a layer and out of it. None keeps all in memory.
        progress: a :class:`~foldkv.progress.Progress` learns the bytes of weights that are read, and how many there are.
        pass_: number of this pass through the weights, and of all passes of the work.

    Raises:
        CheckpointError: a weight of a reference cannot be read or is no number.
        FoldkvError: ONNX Runtime failed.
        SystemFailure: the folder cannot be written.
    """
    report = Progress.of(progress)
    # What other versions or processors computed is not mixed with what these compute.
    kept = None if folder is None else Kept(folder, sha256_json([side.key(jobs), computing()]))
    done, streams = (-1, None) if kept is None else kept.read(jobs)
    if streams is None:
        streams = [side.embedded(job) for job in jobs]
    else:
        report(f"going on after layer {done}")
        if observe is not None:
            observe(done, streams)
    sizes = [side.layer_bytes(layer) for layer in range(side.num_layers)]
    for layer, after in enumerate(side.layers(jobs, streams, first=done + 1), done + 1):
        report.steps(pass_[0] * sum(sizes) + sum(sizes[: layer + 1]), pass_[1] * sum(sizes), BYTES)
        streams = after if kept is None else kept.write(layer, jobs, after)
        if observe is not None:
            observe(layer, streams)
    return streams


def edges_of(chunk: int, tokens: int) -> list[int]:
    """Where chunks of ``chunk`` tokens end in a text of ``tokens``."""
    return list(range(chunk, tokens, chunk))
