#!/usr/bin/env bash
# Measure a CUDA card, without a network: bash benchmarks/gpu.sh --out DIR [--budget SECONDS]
# WHEELS=FOLDER: install the wheels that lie there first, for this call only.
set -euo pipefail
GPU_BEGAN=$(date +%s)
export GPU_BEGAN
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH="$root${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error
python3 "$root/benchmarks/gpu.py" "$@"
