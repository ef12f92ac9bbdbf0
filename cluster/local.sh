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

# shellcheck disable=SC2329
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

fail() {
    echo "error: $1:" >&2
    for log in "$temp"/node*.log; do tail -n 5 "$log" >&2; done
    exit 1
}

# Whether there is time left and no node has ended.
starting() {
    local pid
    ((SECONDS < deadline)) || return 1
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null || return 1; done
}

nodes_up() {
    timeout 20 python - "$nodes" <<'PYTHON' 2>/dev/null
import os, sys
import ray
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="error", log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[1]))
PYTHON
}

# A token of its own: the cluster admits nobody else, and no other run on this machine can replace the token.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_ADDRESS=127.0.0.1:$port
(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && { echo "error: port $port is in use; choose another with -p" >&2; exit 1; }

echo "starting $nodes Ray nodes of $cpus CPUs at $RAY_ADDRESS"
start_node 0 --head --port="$port" --include-dashboard=false --ray-client-server-port=$((port + 99)) --temp-dir="$temp/ray"
deadline=$((SECONDS + 120))
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    starting || fail "the head node did not start"
    sleep 0.5
done
for ((i = 1; i < nodes; i++)); do
    start_node "$i" --address="$RAY_ADDRESS"
done
until nodes_up; do
    starting || fail "not all nodes joined"
    sleep 1
done

"$@" &
command=$!
status=0
wait "$command" || status=$?
exit "$status"
