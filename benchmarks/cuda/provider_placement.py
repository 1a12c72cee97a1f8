"""Ask ONNX Runtime's CUDA provider which nodes of a bundle's segments it would run on a GPU. No GPU needed, and nothing is computed.

Run it with the Python of provider_kernels.py, which has onnxruntime-gpu:

    foldkv build build/graph -o build/bundles --target h100 --backend onnxruntime-cuda
    PYTHONPATH=.typing build/onnxruntime-gpu/bin/python benchmarks/cuda/provider_placement.py build/bundles/h100

It prints a line for each segment, and ends with 1 if a node that is no arithmetic on sizes would run on the processor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stand_ins import restart_with_stand_ins


def placement(bundle: Path) -> bool:
    """Print where the nodes of every segment go; whether all are where they should be."""
    import onnxruntime

    from foldkv.backends import ONNX_RUNTIME_CUDA
    from foldkv.runtime.chain import session_options
    from foldkv.runtime.placement import on_processor, wanted_on_host

    paths = sorted((bundle / "segments").glob("*.onnx"))
    if not paths:
        sys.exit(f"{bundle} has no segments/*.onnx. Give a bundle for ONNX Runtime.")
    right = True
    for path in paths:
        options = session_options(onnxruntime, 1, decode=False, gpu=True)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = onnxruntime.InferenceSession(str(path), options, providers=[ONNX_RUNTIME_CUDA.provider])
        counts: dict[str, int] = {}
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
        wrong = on_processor(session)
        right &= not wrong and ONNX_RUNTIME_CUDA.provider in session.get_providers()
        said = ", ".join(f"{count} nodes on {name}" for name, count in sorted(counts.items()))
        print(
            f"{path.stem}: {said}; {len(wanted_on_host(session))} inputs on the host{'; WRONG: ' if wrong else ''}{', '.join(wrong)}"
        )
    return right


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--gpu", action="store_true", help="this machine has a GPU and CUDA: use no stand-ins")
    given = arguments.parse_args()
    if not given.gpu:
        restart_with_stand_ins()
    sys.exit(0 if placement(given.bundle) else 1)
