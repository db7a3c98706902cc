#!/bin/bash
# usage: .gpu_memory.sh [seconds, 400]: the memory tables of the operation, then tests/gpu/test_layer.py; logs to $OUT
set -u
export OUT=${OUT:-/tmp/out} OMP_NUM_THREADS=6 PYTHONPATH="$PWD:$PWD/benchmarks:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
S=${1:-400}; mkdir -p "$OUT"; BEGAN=$(date +%s); PY=${PY:-python3}
left() { echo $((S - $(date +%s) + BEGAN - ${1:-0})); }
nvidia-smi -L > "$OUT/card.txt" 2>&1
SECONDS_ALL=${KEPT:-140} timeout $(left 5) $PY -u .gpu_kept.py > "$OUT/kept.log" 2>&1; echo "rc $?" >> "$OUT/kept.log"
if [ -n "${TINY:-}" ]; then A=mmrev_kit/assets/embedded/config.json B=$A MORE="--image-size 64"; else A=32b B=8b,2b,4b MORE=; fi
T=$(left 100); [ $T -gt 90 ] && T=90
timeout $((T + 30)) $PY -u benchmarks/memory_cells.py --models $A --recipe-only --seconds $T $MORE --out "$OUT/cells32.md" > "$OUT/cells32.log" 2>&1; echo "rc $?" >> "$OUT/cells32.log"
( timeout $(left 4) $PY -m pytest -q -p no:cacheprovider -rxXs --tb=short --show-capture=no -n 8 tests/gpu/test_layer.py > "$OUT/tests.log" 2>&1; echo "rc $?" >> "$OUT/tests.log" ) &
TESTS=$!
timeout $(left 4) $PY -u benchmarks/memory_cells.py --models $B --seconds $(left 14) $MORE --out "$OUT/cells.md" > "$OUT/cells.log" 2>&1; echo "rc $?" >> "$OUT/cells.log"
wait $TESTS
grep -hE "KEPT|MODULES|Error" "$OUT/kept.log" | cut -c1-330; grep -h "^|" "$OUT/cells32.log" "$OUT/cells.log"; tail -6 "$OUT/tests.log"
