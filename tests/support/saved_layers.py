"""What a layer that a report saved computes, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from polygraphy.comparator import RunResults
from polygraphy.json import load_json

from foldkv.validation.reproducers import BUNDLE, INPUTS, OUTPUTS, SEGMENT


@dataclass(frozen=True)
class SavedLayer:
    """Streams [1, n, N, C] after the layer: by the saved model in ONNX Runtime, by the reference and by the bundle."""

    found: npt.NDArray[np.float32]
    reference: npt.NDArray[np.float32]
    bundle: npt.NDArray[np.float32]

    @classmethod
    def of(cls, folder: Path) -> SavedLayer:
        """Run the layer of a folder."""
        [given] = load_json(str(folder / INPUTS))
        [found] = onnxruntime.InferenceSession(str(folder / SEGMENT)).run(None, given)
        return cls(found, *(_outputs(folder / file) for file in (OUTPUTS, BUNDLE)))

    def apart(self, other: npt.NDArray[np.float32]) -> float:
        """The largest difference of the model's outputs from others."""
        return float(np.abs(self.found - other).max())


def _outputs(file: Path) -> npt.NDArray[np.float32]:
    [(_, [result])] = RunResults.load(str(file)).items()
    values: npt.NDArray[np.float32] = result["after"]
    return values
