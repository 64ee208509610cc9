#!/usr/bin/env bash
# Ranks of one or more machines under torchrun:   launch/local.sh [-n RANKS] [--nodes N --node-rank K --master HOST[:PORT]] -- OVERRIDES
#   launch/local.sh -n 2 -- experiment=tinyworld optimizer=adamw strategy=zero2
#   launch/local.sh -n 8 --nodes 2 --node-rank 0 --master node0:29500 -- experiment=1b ...     (the same on node1 with --node-rank 1)
# The rendezvous is static: it recovers from a killed worker (--restarts N), which the c10d one did not in 3 of 3 tries.
set -euo pipefail
ranks="" nodes=1 node_rank=0 master="127.0.0.1" restarts=0
while [ $# -gt 0 ]; do
  case "$1" in
    -n) ranks="$2"; shift 2 ;;
    --nodes) nodes="$2"; shift 2 ;;
    --node-rank) node_rank="$2"; shift 2 ;;
    --master) master="$2"; shift 2 ;;
    --restarts) restarts="$2"; shift 2 ;;
    --) shift; break ;;
    -h|--help) sed -n '2,6p' "$0"; exit 0 ;;
    *) echo "launch/local.sh: unknown argument $1; overrides come after --" >&2; exit 2 ;;
  esac
done
if [ -z "$ranks" ]; then
  ranks=$(nvidia-smi -L 2>/dev/null | wc -l)
  [ "$ranks" -gt 0 ] || ranks=1
fi
host="${master%%:*}" port="${master##*:}"
if [ "$port" = "$master" ]; then
  [ "$nodes" -eq 1 ] || { echo "launch/local.sh: --master $master names no port, and several nodes need one; use $master:29500" >&2; exit 2; }
  # Below the ports that connections are given, which one of them could take before torchrun does.
  port=$(python -c '
import random, socket
while True:
    port = random.randrange(20000, 30000)
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.1", port)):
            break
print(port)')
elif [ "$node_rank" -eq 0 ] && ! python -c "import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('', $port))" 2>/dev/null; then
  echo "launch/local.sh: port $port of --master $master is in use; choose another" >&2; exit 2
fi
# Without these, a signal to torchrun leaves its workers behind; with them they have time to save.
exec python -m torch.distributed.run --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$ranks" \
  --rdzv-backend static --master-addr "$host" --master-port "$port" --max-restarts "$restarts" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout="${SAVE_SECONDS:-120}" -m trainer "$@"
