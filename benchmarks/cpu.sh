#!/usr/bin/env bash
# Measure this machine's cores while nothing else runs: bash benchmarks/cpu.sh DIR [train_dreambooth.py]
# Each line writes its own file into DIR, in the order of value; then: python -m studies.costs --write
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$1 script=${2:-}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error MPLBACKEND=Agg
run() { ${PYTHON:-python3} "$root/benchmarks/$1.py" --out "$out" "${@:2}"; }
run cold_start
run busy
run step_cost --blocks 9 --steps 8
if [ -n "$script" ]; then
    run against_diffusers "$script" --blocks 15 --steps 10
    run against_diffusers "$script" --shrunk 4 --resolution 256 --train-batch-sizes 1 --blocks 7 --steps 2
fi
run growth
