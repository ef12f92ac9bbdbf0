#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, for the time of one command:
#
#   cluster/local.sh [-n NODES] [-c CPUS_PER_NODE] [-p PORT] -- COMMAND...
#   cluster/local.sh -n 2 -c 1 -- python -m rlhf_dist.main --config configs/world_two_ranks.yaml
#
# The command finds the cluster through RAY_ADDRESS; the exit status is the command's.
set -euo pipefail

nodes=2 cpus=1 port=6379
while getopts "n:c:p:h" option; do
    case $option in
        n) nodes=$OPTARG ;;
        c) cpus=$OPTARG ;;
        p) port=$OPTARG ;;
        *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [[ $# -eq 0 || ! $nodes =~ ^[1-9][0-9]*$ || ! $cpus =~ ^[1-9][0-9]*$ || ! $port =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 [-n NODES] [-c CPUS_PER_NODE] [-p PORT] -- COMMAND... (NODES, CPUS and PORT are numbers above 0)" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -d $root/.venv/bin ]] && export PATH=$root/.venv/bin:$PATH
command -v ray >/dev/null || { echo "error: no 'ray' command; run 'make setup' first" >&2; exit 1; }

# Sockets lie in here, whose paths must stay below 108 characters.
temp=$(mktemp -d /tmp/raylocal.XXXXXX)
pids=()

stop() {
    trap '' INT TERM
    # By process id: `ray stop` would end every Ray process of the machine.
    if ((${#pids[@]})); then
        kill -TERM "${pids[@]}" 2>/dev/null || true
        wait "${pids[@]}" 2>/dev/null || true
    fi
    rm -rf "$temp"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Node i has ports of its own: 1000 for workers from 20000 + 1000 i on, one for the dashboard's agent.
start_node() {
    local i=$1
    shift
    ray start --block --num-cpus="$cpus" --node-ip-address=127.0.0.1 --disable-usage-stats \
        --min-worker-port=$((20000 + 1000 * i)) --max-worker-port=$((20999 + 1000 * i)) \
        --dashboard-agent-listen-port=$((port + 100 + i)) "$@" >"$temp/node$i.log" 2>&1 &
    pids+=($!)
}

nodes_up() {
    python - "$nodes" <<'PYTHON' 2>/dev/null
import os, sys
import ray
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="error", log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[1]))
PYTHON
}

export RAY_ADDRESS=127.0.0.1:$port
echo "starting $nodes Ray nodes of $cpus CPUs at $RAY_ADDRESS"
start_node 0 --head --port="$port" --include-dashboard=false --ray-client-server-port=$((port + 99)) --temp-dir="$temp/ray"
for ((attempt = 0; attempt < 60; attempt++)); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
    kill -0 "${pids[0]}" 2>/dev/null || { echo "error: the head node did not start:" >&2; cat "$temp/node0.log" >&2; exit 1; }
    sleep 0.5
done
for ((i = 1; i < nodes; i++)); do
    start_node "$i" --address="$RAY_ADDRESS"
done
for ((attempt = 0; attempt < 30; attempt++)); do
    nodes_up && break
    sleep 1
done
((attempt < 30)) || { echo "error: not all nodes joined:" >&2; tail -n 5 "$temp"/node*.log >&2; exit 1; }

"$@" &
command=$!
status=0
wait "$command" || status=$?
exit "$status"
