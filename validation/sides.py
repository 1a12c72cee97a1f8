"""The sides that are compared: subject and references, and how each is opened, with the whole model in memory or a layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..export.checkpoint.reader import Checkpoint
from ..progress import Say, silent
from ..runtime.model import Model
from ..runtime.tokenizer import Tokenizer
from .inside import Choices, GraphChoices
from .layered_oracle import LayeredOracleRunner
from .layered_runner import LayeredRunner
from .runners import Oracle, OracleRunner, Reference, Subject, TransformersRunner


@dataclass(frozen=True)
class Sides:
    """Subject and references, opened.

    Attributes:
        subject: the bundle.
        choices: says what its indexers chose; None where they are recomputed, or there are none.
        reference: transformers in float32, in memory or layer by layer.
        oracle: what a bundle of the profile served must compute; None in others.
        yardstick: transformers in bfloat16, for a bundle in bfloat16; None for others.
        checkpoint: of all of them.
        tokenizer: likewise.
        threads: of the references, and of a subject on the CPU.
    """

    subject: Subject
    choices: Choices | None
    reference: Reference
    oracle: Oracle | None
    yardstick: Reference | None
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    threads: int


def open_transformers(
    checkpoint: Checkpoint, precision: str, *, whole: bool, folder: Path | None = None, progress: Say = silent
) -> Reference:
    """The reference or the yardstick, by its precision. ``folder`` and ``progress`` are of one that goes a layer at a time.

    Raises:
        CheckpointError: the checkpoint does not load completely.
    """
    if whole:
        return TransformersRunner(checkpoint.folder, allow_unknown_keys=checkpoint.allowed_keys, precision=precision)
    return LayeredRunner(checkpoint, precision=precision, folder=folder, progress=progress)


def open_oracle(checkpoint: Checkpoint, *, whole: bool, folder: Path | None = None, progress: Say = silent) -> Oracle:
    """The oracle of the profile served; arguments as of :func:`open_transformers`."""
    if whole:
        return OracleRunner(checkpoint.folder, allow_unknown_keys=checkpoint.allowed_keys)
    return LayeredOracleRunner(checkpoint, folder=folder, progress=progress)


def open_choices(model: Model, checkpoint: Checkpoint, *, whole: bool) -> Choices | None:
    """What the indexers of an open bundle on a processor chose; None on a GPU, which has no room for a second copy of the weights, and for a
    model without indexers."""
    layers = list(checkpoint.spec.indexed_ratios)
    if model.bundle.backend.gpu or model.chain is None or not layers:
        return None
    return GraphChoices(model.chain, layers, ahead=not whole)
