#!/usr/bin/env bash
# Builds, checks and times all of kernels/ on this machine's GPU, in less than ten minutes; figures go
# to bench/results/gpu-*.json. What fails is named, and the rest still runs.
#   kernels/run_on_gpu.sh [MIB...]        (default 256 1024)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SIZES=("$@")
[ ${#SIZES[@]} -gt 0 ] || SIZES=(256 1024)
failed=0

attempt() {  # SECONDS COMMAND...
    timeout "$@" || { echo "FAILED ($?): ${*:2}" >&2; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$PYTHON" -c 'import pybind11, pytest, torch, triton; assert torch.cuda.is_available()' || {
    echo "$PYTHON lacks a package, or torch one for CUDA: make build, or PYTHON=..." >&2; exit 2; }
KVWIRE_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
"$PYTHON" -c 'import kvwire.kernels' || {
    echo "kvwire is not installed there: pip install --no-build-isolation -e ." >&2; exit 2; }

attempt 180 "$PYTHON" -m pytest -q -m gpu tests/test_kernels_gpu.py tests/test_staging_gpu.py \
    tests/test_connector_gpu.py tests/test_bench_gpu.py
KVWIRE_BACKEND=triton attempt 90 "$PYTHON" -m pytest -q -m gpu tests/test_staging_gpu.py

name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
results=bench/results/gpu-$name
for backend in cuda triton; do
    attempt 240 "$PYTHON" -m bench.gpu --backend "$backend" --mib "${SIZES[@]}" \
        --json "$results-$backend.json"
done
attempt 120 "$PYTHON" -m bench.gpu_staging --mib "${SIZES[0]}" --json "$results-staging.json"
KVWIRE_BACKEND=triton attempt 120 "$PYTHON" -m bench.gpu_staging --mib "${SIZES[0]}" \
    --json "$results-staging-triton.json"
attempt 120 "$PYTHON" -m bench.gpu_peers --mib "${SIZES[0]}" --json "$results-peers.json"

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        attempt 60 compute-sanitizer --tool "$tool" --error-exitcode 3 \
            "$PYTHON" -m bench.gpu --backend cuda --mib 1 --pages 4096 --models
    done
    KVWIRE_BACKEND=cuda attempt 60 compute-sanitizer --tool memcheck --error-exitcode 3 \
        "$PYTHON" -m bench.gpu_staging --mib 1 --page-bytes 4096
else
    echo "compute-sanitizer is not here: memory errors were not looked for" >&2
fi
exit $failed
