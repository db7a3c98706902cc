#!/bin/bash
# peers.sh MODEL SECONDS [more arguments of benchmarks/peers.py]: from the checkout's root, the kit's own libraries on
# PYTHONPATH, peers.tar.xz beside this file; logs and tables go to $OUT.
began=$(date +%s)
here=$(cd "$(dirname "$0")" && pwd); model=${1:-2b}; seconds=${2:-240}; shift 2
sites=${SITES:-/tmp/peer_sites}
if [ ! -e "$sites/ready" ]; then mkdir -p "$sites" && tar -xJf "$here/peers.tar.xz" -C "$sites" && touch "$sites/ready"; fi
python3 benchmarks/peers.py --model "$model" --sites "$sites" --out "${OUT:-out}" \
  --seconds $((seconds - ($(date +%s) - began))) "$@" 2>&1
echo "peers.sh $model: exit $?, $(($(date +%s) - began)) s"
