#!/usr/bin/env bash
# Builds, checks and times all of kernels/ on this machine's GPU, in less than ten minutes; figures go
# to bench/results/gpu-*.json.
#   kernels/run_on_gpu.sh [MIB...]        (default 256 1024)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SIZES=("$@")
[ ${#SIZES[@]} -gt 0 ] || SIZES=(256 1024)

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
KVWIRE_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
timeout 180 "$PYTHON" -m pytest -q -m gpu tests/test_bench_gpu.py tests/test_staging_gpu.py \
    tests/test_connector_gpu.py

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 3 \
            "$PYTHON" -m bench.gpu --backend cuda --mib 1 --pages 4096 --models
    done
    timeout 60 compute-sanitizer --tool memcheck --error-exitcode 3 \
        "$PYTHON" -m bench.gpu_staging --mib 1 --page-bytes 4096
else
    echo "compute-sanitizer is not here: memory errors were not looked for" >&2
fi

name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
results=bench/results/gpu-$name
for backend in cuda triton; do
    "$PYTHON" -m bench.gpu --backend "$backend" --mib "${SIZES[@]}" --json "$results-$backend.json"
done
"$PYTHON" -m bench.gpu_staging --mib "${SIZES[0]}" --json "$results-staging.json"
"$PYTHON" -m bench.gpu_peers --mib "${SIZES[0]}" --json "$results-peers.json"
