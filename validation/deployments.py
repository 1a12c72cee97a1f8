"""What a ``served`` bundle does not reproduce of deployed systems, and how far some of it is from the bundle.

The oracle of the profile computes the same texts with one more rounding. Its distance from the bundle is what a user of that
deployment sees beside the bundle, kernels' order of sums aside. It judges nothing: no gate reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..export.contract.profiles import SERVED
from .metrics import TokenFigures, concatenate, summary

ROWS, W8A8, BOTH = "rows", "w8a8", "rows and w8a8"
#: What is measured, in words.
MEASURED = {
    ROWS: "rows are rounded to bfloat16 before they are quantised to e4m3",
    W8A8: "inputs of products with fp8 and fp4 weights are quantised to e4m3, 1x128 with ue8m0 scales (W8A8)",
    BOTH: "both",
}
#: What is not, in words.
NOT_MEASURED = (
    "bfloat16 between operators: index scores, query norms, the Hadamard rotation and attention's probabilities are float32 here",
    "the order in which kernels sum, and batches in which it changes",
    "indexers of other engines: without a Hadamard rotation, or with fp8 rows in place of fp4",
)
NO_QUANTISED_WEIGHTS = "no weight of this checkpoint is stored in fp8 or fp4"


@dataclass(frozen=True)
class DeploymentFigure:
    """One deployment against the bundle, over all predicted tokens; figures are None where ``lack`` says why there are none."""

    name: str
    lack: str | None
    kl_mean: float | None = None
    kl_mean_error: float | None = None
    kl_p999: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None


def deployment_figure(name: str, texts: Sequence[TokenFigures]) -> DeploymentFigure:
    """From the bundle compared with a deployment, text by text: KL is from the deployment, the perplexity's ratio is bundle over it."""
    found = summary(concatenate(list(texts)))
    names = DeploymentFigure.__dataclass_fields__.keys() - {"name", "lack"}
    return DeploymentFigure(name, None, **{key: found[key] for key in names})


def not_reproduced(profile: str) -> list[str]:
    """What a bundle of a profile leaves out of what deployed systems compute."""
    if profile != SERVED:
        return []
    return [*(MEASURED[name] for name in (ROWS, W8A8)), *NOT_MEASURED]
