#!/usr/bin/env bash
# A Ray cluster on this machine whose nodes are apart like machines, for the time of one command; needs root:
#
#   cluster/namespaces.sh [-n NODES] [-c CPUS_PER_NODE] [-m SHM_MB] [-k FOLDER]... -- COMMAND...
#   cluster/namespaces.sh -n 3 -c 2 -m 512 -k /tmp/runs -- python -m rlhf_dist.main run.root=/tmp/runs
#
# Each node has its own address, processes, /tmp and /dev/shm (of SHM_MB, 256 if not given), and offers 100 of the
# custom resource nodeN, from node0, the head, where the command runs. Of /tmp only the checkout, the current folder and
# the folders given with -k are there for all nodes. No node reaches a network outside. Within the command:
#
#   ray-node kill N      end node N and all of its processes at once
#   ray-node cut N       take its network cable away; processes and connections stay
#   ray-node mend N      put it back
#
# The command finds the cluster through RAY_ADDRESS; the exit status is the command's.
set -euo pipefail

nodes=2 cpus=1 shm=256 keep=()
while getopts "n:c:m:k:h" option; do
    case $option in
        n) nodes=$OPTARG ;;
        c) cpus=$OPTARG ;;
        m) shm=$OPTARG ;;
        k) keep+=("$OPTARG") ;;
        *) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
if [[ $OPTIND -gt $# || ! $nodes =~ ^[1-9][0-9]?$ || ! $cpus =~ ^[1-9][0-9]*$ || ! $shm =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 [-n NODES] [-c CPUS_PER_NODE] [-m SHM_MB] [-k FOLDER]... -- COMMAND... (NODES from 1 to 99)" >&2
    exit 2
fi
for tool in unshare nsenter setpriv ip flock; do
    command -v "$tool" >/dev/null || { echo "error: no '$tool'; install util-linux and iproute2" >&2; exit 1; }
done
((EUID == 0)) || { echo "error: namespaces need root; cluster/local.sh does not" >&2; exit 1; }

# A network of its own for the bridge between the nodes. What is mounted from here on, nobody outside sees.
if [[ -z ${RLHF_NAMESPACES:-} ]]; then
    RLHF_NAMESPACES=1 exec unshare --net --mount --propagation private bash "$0" "$@"
fi
unset RLHF_NAMESPACES
shift $((OPTIND - 1))

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -d $root/.venv/bin ]] && export PATH=$root/.venv/bin:$PATH
command -v ray >/dev/null || { echo "error: no 'ray' command; run 'make setup' first" >&2; exit 1; }

temp=$(mktemp -d /tmp/raynodes.XXXXXX)
pids=()

# shellcheck disable=SC2329
stop() {
    trap '' INT TERM
    # The first process of a node takes all others with it.
    if ((${#pids[@]})); then
        kill -KILL "${pids[@]}" 2>/dev/null || true
        while kill -0 "${pids[@]}" 2>/dev/null; do sleep 0.1; done
    fi
    [[ -n ${orders:-} ]] && kill "$orders" 2>/dev/null
    rm -rf "$temp"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "error: $1:" >&2
    for log in "$temp"/node*.log; do tail -n 5 "$log" >&2; done
    exit 1
}

# Inside node i: its places and its address, then Ray.
# shellcheck disable=SC2329
node() {
    local i=$1 here folder
    shift
    here=$(mktemp -d)
    mount -t tmpfs -o mode=1777 tmpfs "$here"
    for folder in "${shared[@]}"; do # what all nodes see, of what /tmp hides
        if [[ $folder == /tmp/* ]]; then
            mkdir -p "$here${folder#/tmp}"
            mount --bind "$folder" "$here${folder#/tmp}"
        fi
    done
    mount --rbind "$here" /tmp
    mount -t tmpfs -o mode=1777,size="$shm"m tmpfs /dev/shm
    hostname "node$i"
    mount --bind "$temp/hosts" /etc/hosts
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
    ip link set lo up
    ip address add "10.77.0.$((i + 1))/24" dev eth0
    ip link set eth0 up
    cd "$place"
    exec ray start --block --num-cpus="$cpus" --node-ip-address="10.77.0.$((i + 1))" --disable-usage-stats \
        --object-store-memory=$((shm * 700000)) --resources="{\"node$i\": 100}" "$@"
}

start_node() {
    local i=$1 settings
    shift
    settings=$(declare -p shared shm cpus temp place; declare -f node)
    setpriv --pdeathsig KILL unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc \
        bash -euc "$settings; node \"\$@\"" node "$i" "$@" >"$temp/node$i.log" 2>&1 &
    pids+=($!)
    disown # bash does not report its end, which may be meant
    # Its namespace must be there before its cable.
    until [[ $(readlink "/proc/${pids[i]}/ns/net") != "$(readlink /proc/self/ns/net)" ]]; do
        starting || fail "node $i did not start"
        sleep 0.1
    done
    ip link add "node$i" type veth peer name eth0 netns "${pids[i]}"
    ip link set "node$i" master bridge up
}

# Whether there is time left and no node has ended.
starting() {
    local pid
    ((SECONDS < deadline)) || return 1
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null || return 1; done
}

# On the head node.
on_head() {
    local first
    first=$(<"/proc/${pids[0]}/task/${pids[0]}/children")
    nsenter --net --mount --uts --ipc --pid --target "${first% }" --wd="$place" "$@"
}

nodes_up() {
    on_head timeout 20 python - "$nodes" <<'PYTHON' 2>/dev/null
import os, sys
import ray
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="error", log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[1]))
PYTHON
}

# What `ray-node` asks for is done out here: within a node the others cannot be seen.
carry_out() {
    local what who
    while read -r what who <"$temp/orders"; do
        case $what in
            kill) kill -KILL "${pids[who]}" ;;
            cut) ip link set "node$who" down ;;
            mend) ip link set "node$who" up ;;
        esac && echo "done" >"$temp/answers" || echo "failed" >"$temp/answers"
    done
}

place=$PWD
shared=("$root" "$place" "$temp")
for folder in "${keep[@]}"; do
    mkdir -p "$folder"
    shared+=("$(cd "$folder" && pwd)")
done
echo "127.0.0.1 localhost" >"$temp/hosts"
for ((i = 0; i < nodes; i++)); do echo "10.77.0.$((i + 1)) node$i" >>"$temp/hosts"; done

mkdir "$temp/bin"
mkfifo "$temp/orders" "$temp/answers"
cat >"$temp/bin/ray-node" <<SCRIPT
#!/usr/bin/env bash
set -euo pipefail
if [[ \$# -ne 2 || ! \$1 =~ ^(kill|cut|mend)$ || ! \$2 =~ ^[0-9]+$ || \$2 -ge $nodes ]]; then
    echo "usage: ray-node kill|cut|mend N (N from 0 to $((nodes - 1)))" >&2
    exit 2
fi
exec 9>"$temp/lock"
flock 9
echo "\$1 \$2" >"$temp/orders"
[[ \$(<"$temp/answers") == "done" ]] || { echo "error: node \$2 is gone already" >&2; exit 1; }
SCRIPT
chmod +x "$temp/bin/ray-node"

# A token of its own: the cluster admits nobody else, and no other run on this machine can replace the token.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_ADDRESS=10.77.0.1:6379 PATH="$temp/bin:$PATH"

echo "starting $nodes Ray nodes of $cpus CPUs at $RAY_ADDRESS"
ip link add bridge type bridge
ip link set bridge up
deadline=$((SECONDS + 120))
start_node 0 --head --port=6379 --include-dashboard=false
until on_head ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do
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
carry_out 2>/dev/null &
orders=$!

on_head "$@" &
command=$!
status=0
wait "$command" || status=$?
exit "$status"
