#!/usr/bin/env bash
# Everything there is to run on a GPU, within ten minutes: the tests marked `gpu`, then the kernels' benchmark.
#
#   PYTHON=python3 benchmarks/gpu.sh RESULTS_FOLDER
#
# The Python needs torch with CUDA, the packages of the extras export, plugins and gpu, pytest and hypothesis; nothing is
# installed. An engine is executed too where tensorrt-rtx is there and has engines for the GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh RESULTS_FOLDER}
python=${PYTHON:-python3}
mkdir -p "$out" .typing/foldkv
for entry in *.py py.typed export optimize plugins runtime validation; do ln -sfn "../../$entry" ".typing/foldkv/$entry"; done
export PYTHONPATH="$PWD/.typing${PYTHONPATH:+:$PYTHONPATH}" FOLDKV_CACHE="$out/cache"
failed=0
timeout 240 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/plugins/test_gpu.py tests/runtime/test_engine_gpu.py \
  2>&1 | tee "$out/tests.txt" || failed=1
# The tests run Triton's interpreter for their references; the benchmark must not.
env -u TRITON_INTERPRET timeout 330 "$python" benchmarks/kernels_gpu.py -o "$out/kernels.json" --seconds 270 || failed=1
exit "$failed"
