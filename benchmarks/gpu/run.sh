#!/usr/bin/env bash
# Everything that only a GPU can prove, within a quarter of an hour. See docs/gpu.md.
#
#   PYTHON=python3 benchmarks/gpu/run.sh OUT [STEP...]
#
# Steps, in order of importance: kernels engine model stability sanitizer layers speed. Each has a time limit, 805 seconds together,
# and a result file of its own in OUT; one that fails does not stop the next. `tune` runs only if it is named. `prepare.py`
# makes the parcel (FOLDKV_GPU_KIT, build/gpu-kit) without a GPU; if it comes in pieces (FOLDKV_GPU_PARCELS,
# build/gpu-parcels), they are joined first. Nothing is installed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: benchmarks/gpu/run.sh OUT [STEP...]}
shift
python=${PYTHON:-python3}
export FOLDKV_GPU_KIT=${FOLDKV_GPU_KIT:-$PWD/build/gpu-kit} PYTHONUNBUFFERED=1
parcels=${FOLDKV_GPU_PARCELS:-$PWD/build/gpu-parcels}
package=${FOLDKV_GPU_PACKAGE:-$PWD/build/gpu-package}
mkdir -p "$out" "$package/foldkv"
for entry in *.py py.typed export optimize plugins runtime validation; do ln -sfn "$PWD/$entry" "$package/foldkv/$entry"; done
export PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$parcels/*.tar" > /dev/null; then "$python" benchmarks/gpu/parcels.py unpack "$parcels" "$FOLDKV_GPU_KIT"; fi
"$python" benchmarks/gpu/facts.py -o "$out/facts.json"

failed=0
step() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  local code=$?
  tail -n "${TAIL:-12}" "$out/$name.log"
  if [ $code -ne 0 ]; then
    failed=1
    echo "$name: exit code $code"
  fi
}

[ $# -gt 0 ] || set -- kernels engine model stability sanitizer layers speed
for name in "$@"; do
  case $name in
    kernels) step kernels 60 "$python" benchmarks/gpu/step_kernels.py -o "$out/kernels.json" ;;
    engine) step engine 150 "$python" benchmarks/gpu/step_engine.py -o "$out/engine.json" ;;
    model) step model 90 "$python" benchmarks/gpu/step_model.py -o "$out/model.json" ;;
    stability) step stability 45 "$python" benchmarks/gpu/step_stability.py -o "$out/stability.json" ;;
    sanitizer) step sanitizer 110 "$python" benchmarks/gpu/step_sanitizer.py -o "$out/sanitizer.json" ;;
    layers) step layers 210 "$python" benchmarks/gpu/step_layers.py -o "$out/layers.json" --budget 200 ;;
    speed) step speed 140 "$python" benchmarks/gpu/step_speed.py -o "$out/speed.json" --seconds "${SPEED_SECONDS:-120}" ;;
    tune) step tune 130 "$python" benchmarks/gpu/tune.py measure -o "$out/tune.json" --seconds 110 ;;
    *) echo "unknown step $name" && failed=1 ;;
  esac
done
"$python" benchmarks/gpu/collect.py "$out"
exit $failed
