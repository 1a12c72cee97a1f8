"""Reference and subject behind one protocol: tokens in, logits at every position out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from foldkv.errors import CheckpointError, MissingDependencyError, listing
from foldkv.export.checkpoint import Checkpoint
from foldkv.runtime.session import Session
from foldkv.validation.selection import Selection

Logits = npt.NDArray[np.float32]


class Runner(Protocol):
    """Something that gives next-token logits."""

    name: str

    def logits(self, tokens: Sequence[int]) -> Logits:
        """[n] tokens from an empty state -> [n, V] float32."""
        ...


class TailRunner(Protocol):
    """Something that reads a long stream in chunks and gives logits at its end."""

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """[n] tokens and a tail of [m] from an empty state -> [m, V] float32, after each token of the tail."""
        ...


class TransformersRunner:
    """The reference: transformers' DeepseekV4ForCausalLM, eager, float32.

    Raises:
        CheckpointError: the checkpoint does not load whole.
        MissingDependencyError: transformers is not installed.
    """

    def __init__(self, checkpoint: Path, *, allow_unknown_keys: Sequence[str] = ()) -> None:
        Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys).check()
        try:
            import transformers
        except ImportError:
            raise MissingDependencyError("validate needs transformers. Run `pip install 'foldkv[export]'`.") from None
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        self.name = f"transformers {transformers.__version__}, float32"
        import torch

        model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        problems = [f"{kind} {name}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
                    for name in info.get(kind, ())]  # fmt: skip
        if problems:
            raise CheckpointError(
                listing(f"transformers does not load {checkpoint} whole", problems, "Check the checkpoint.")
            )
        # What transformers dequantises stays bfloat16, which holds e4m3 and e2m1 times a power of two exactly.
        self.model: Any = model.float().eval().requires_grad_(False)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """One pass over all tokens, without a cache."""
        import torch

        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        result: Logits = out.float().numpy()
        return result

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int], *, chunk: int = 256) -> Logits:
        """The tokens in chunks through transformers' own cache, then the tail in one."""
        import torch
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            for at in range(0, len(tokens), chunk):
                part = torch.tensor([list(tokens[at : at + chunk])])
                self.model(input_ids=part, past_key_values=cache, logits_to_keep=1)
            result: Logits = self.model(input_ids=torch.tensor([list(tail)]), past_key_values=cache).logits[0].numpy()
        return result

    def streams(self, tokens: Sequence[int]) -> list[Logits]:
        """The residual streams [n, N, C] after every layer, from one pass over all tokens."""
        import torch

        streams: list[Logits] = []

        def keep(_: Any, __: Any, out: Any) -> None:
            streams.append((out[0] if isinstance(out, tuple) else out)[0].float().numpy())

        hooks = [layer.register_forward_hook(keep) for layer in self.model.model.layers]
        try:
            with torch.no_grad():
                self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return streams

    def selections(self, tokens: Sequence[int]) -> dict[int, Selection]:
        """What every indexer chose, by layer, from one pass over all tokens."""
        import torch

        chosen: dict[int, Any] = {}
        weights: dict[int, Any] = {}
        hooks = []
        for index, layer in enumerate(self.model.model.layers):
            indexer = getattr(layer.self_attn.compressor, "indexer", None)
            if indexer is None:
                continue
            hooks.append(indexer.register_forward_hook(lambda _, __, out, i=index: chosen.update({i: out[0]})))
            hooks.append(
                layer.self_attn.register_forward_hook(lambda _, __, out, i=index: weights.update({i: out[1][0]}))
            )
        try:
            with torch.no_grad():
                self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        count = len(tokens)
        # Without a cache the keys are the tokens, then the entries.
        return {i: Selection(chosen[i].numpy(), weights[i][:, :, count:].float().numpy()) for i in chosen}


class OracleRunner:
    """The profile ``served`` in plain PyTorch (export/served.py): what a served bundle must compute, whatever it costs."""

    name = "foldkv's oracle of the profile served, float32"

    def __init__(self, checkpoint: Path, *, allow_unknown_keys: Sequence[str] = ()) -> None:
        from foldkv.export.checkpoint import decoder_from_checkpoint

        self._decoder = decoder_from_checkpoint(Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys))

    def logits(self, tokens: Sequence[int]) -> Logits:
        """One pass over all tokens, without a cache."""
        result: Logits = self._run(tokens).logits.numpy()
        return result

    def streams(self, tokens: Sequence[int]) -> list[Logits]:
        """The residual streams [n, N, C] after every layer, from one pass over all tokens."""
        return [streams.numpy() for streams in self._run(tokens).streams]

    def _run(self, tokens: Sequence[int]) -> Any:
        import torch

        from foldkv.export.served import served_forward

        with torch.no_grad():
            return served_forward(self._decoder, torch.tensor(list(tokens)))


class SessionRunner:
    """The subject: a bundle in a session, fed in chunks through its compressed caches."""

    def __init__(self, bundle: Path, *, context: int, chunk: int = 64) -> None:
        self.session = Session(bundle, context=context, chunk=chunk)
        self.name = f"{self.session.bundle.target} bundle"

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Prefill from an empty state in chunks."""
        self.session.reset()
        return self.session.forward([list(tokens)], logits="all")[0]

    def logits_in(self, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
        """As :meth:`logits`, fed in pieces of these sizes."""
        self.session.reset()
        parts, start = [], 0
        for size in sizes:
            parts.append(self.session.forward([list(tokens[start : start + size])], logits="all")[0])
            start += size
        return np.concatenate(parts)

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """The tokens in chunks, of which only the state is kept, then the tail."""
        self.session.reset()
        self.session.prefill([list(tokens)])
        return self.session.forward([list(tail)], logits="all")[0]
