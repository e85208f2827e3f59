#!/usr/bin/env bash
# Several nodes without SLURM: the same command on each of them, within ten minutes.
#
#   HEAD=node1 NODES=2 ./launch/multi_node.sh RECIPE --run-dir DIR [--section.field VALUE ...]
#
# HEAD is the node where all meet, by a name that every node can resolve; start it first. Checkout and DIR are
# on a file system that all share. PORT (29400) must be free on HEAD, and another for each run at a time;
# PROCESSES_PER_NODE is one a GPU if it is not set. After a worker has died all start again from the last
# checkpoint, up to MAX_RESTARTS (3) times. A wish to stop goes to any node, as a signal, or is a file STOP
# in DIR. Where HEAD does not know itself by that name, set NODE_RANK=0 there.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment

[ -n "${HEAD:-}" ] && [ -n "${NODES:-}" ] || fail "set HEAD, the node where all meet, and NODES, how many there are"
"$PYTHON" -m distvgg config "$@" >/dev/null # a typo is said on the node where it was made
rank=1
for name in "$(hostname)" "$(hostname -f 2>/dev/null)" "$(hostname -s)" $(hostname -I); do
    [ "$name" != "$HEAD" ] && [ "$name" != "$(getent ahosts "$HEAD" | awk '{ print $1; exit }')" ] || rank=0
done

exec "$PYTHON" -m distvgg launch --nodes "$NODES" --rank "${NODE_RANK:-$rank}" --head "$HEAD" --port "${PORT:-29400}" \
    --processes "${PROCESSES_PER_NODE:-0}" --max_restarts "${MAX_RESTARTS:-3}" -- "$@"
