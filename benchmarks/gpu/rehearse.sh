#!/usr/bin/env bash
# The kit's run without a GPU, with the versions of a machine that has one: every step must come as far as the first call of
# CUDA, and stop there.
#
#   benchmarks/gpu/rehearse.sh PYTHON3.12 [ENVIRONMENT]
#
# Makes the environment (build/gpu-rehearsal; torch with CUDA takes several GB) and needs the parcel that prepare.py makes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:?usage: benchmarks/gpu/rehearse.sh PYTHON3.12 [ENVIRONMENT]}
environment=${2:-build/gpu-rehearsal}
out=$(mktemp -d)
if [ ! -x "$environment/bin/python" ]; then
  "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r benchmarks/gpu/requirements.txt
fi
PYTHON="$environment/bin/python" FOLDKV_GPU_PARCELS=/nonexistent benchmarks/gpu/run.sh "$out" || true
"$environment/bin/python" - "$out" <<'END'
import json, pathlib, sys
from_steps = {path.stem: json.loads(path.read_text()) for path in pathlib.Path(sys.argv[1]).glob("*.json")}
steps = {name: content for name, content in from_steps.items() if "status" in content and "step" in content}
wrong = {
    name: content["reasons"]
    for name, content in steps.items()
    if content["status"] != "no GPU" or any("failure" in row for row in content["rows"])
}
missing = {"kernels", "engine", "model", "stability", "sanitizer", "layers", "speed"} - set(steps)
print("rehearsed:", ", ".join(sorted(steps)))
if wrong or missing:
    sys.exit(f"not as far as the first call of CUDA: {wrong or ''} {', '.join(missing)}")
END
