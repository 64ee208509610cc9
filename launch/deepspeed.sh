#!/usr/bin/env bash
# The same under DeepSpeed's launcher:   launch/deepspeed.sh [DEEPSPEED ARGUMENTS] -- OVERRIDES
#   launch/deepspeed.sh --num_gpus 2 -- experiment=tinyworld optimizer=adamw strategy=zero3
#   launch/deepspeed.sh --hostfile hosts -- ...        (a line a machine: "node0 slots=8"; ssh without a password)
# On SIGTERM this launcher leaves live workers behind: under a scheduler use torchrun or srun.
set -euo pipefail
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --) shift; break ;;
    -h|--help) sed -n '2,6p' "$0"; exit 0 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
if ! command -v nvidia-smi >/dev/null; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
exec deepspeed --no_local_rank "${arguments[@]}" --module trainer "$@"
