#!/bin/bash
# usage: .gpu_layer.sh [seconds]   logs to $OUT as it goes
set -u
export OUT=${OUT:-/tmp/out} SECONDS_ALL=${1:-240} OMP_NUM_THREADS=6 PYTHONPATH="$PWD:$PWD/benchmarks:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
mkdir -p "$OUT"; START=$(date +%s); export START
nvidia-smi -L > "$OUT/card.txt" 2>&1
( timeout $((SECONDS_ALL)) python3 -u .gpu_layer.py > "$OUT/layer.log" 2>&1 ) &
MAIN=$!
( timeout 150 python3 -m pytest -q -p no:cacheprovider -rxX --tb=short tests/model/test_layer_kernels.py tests/gpu/test_layer.py tests/gpu/test_gpu.py -k "kernel or layer or adapters or masks or norms or rotary or attention or weights or losses or operation or second" > "$OUT/tests.log" 2>&1; echo "rc $?" >> "$OUT/tests.log" ) 
touch "$OUT/tests_done"
wait $MAIN; echo "rc $?" >> "$OUT/layer.log"
tail -25 "$OUT/tests.log"; tail -80 "$OUT/layer.log"
