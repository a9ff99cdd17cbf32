#!/bin/sh
# DDP by torchrun on NODES nodes of GPUS GPUs. On every node:
#   HEAD=<address of the first node> bench/launch/torchrun.sh NODES GPUS script.py [its arguments]
# With one node HEAD is not needed. For an unmodified script written for peft, put
# `-m peftfast run script.py` in place of `script.py`.
set -eu
nodes=$1 gpus=$2
shift 2
if [ "$nodes" -eq 1 ]; then
    exec torchrun --standalone --nproc-per-node "$gpus" "$@"
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:?address of the first node}:${PORT:-29500}" --rdzv-id "${JOB:-peftfast}" "$@"
