#!/usr/bin/env bash
# A run on Slurm: one Ray node on each node of the allocation, the program on the first. cluster/slurm.md.
#
#   sbatch -N NODES -t TIME [OPTIONS] cluster/slurm.sh [--config FILE] run.root=SHARED run.name=NAME [key.path=value ...]
#   sbatch -N 1 -t 8:00:00 --gpus-per-node=8 cluster/slurm.sh \
#       --config configs/gpu_8b_8gpu.yaml run.root=/shared/runs run.name=first
#
# Submit it in the checkout, which all nodes see under the same path, as run.root. The exit status is the program's.
# What `sbatch` is told on the command line wins over these lines.
#SBATCH --job-name=rlhf
#SBATCH --nodes=1
# Whole nodes: `ray symmetric-run` ends with `ray stop`, which ends every Ray process that the user has on a node.
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
# To this script alone, so many seconds before the time limit: the program saves, and the job is queued again. More than
# run.term_limit and the report need. Slurm may send it up to a minute early.
#SBATCH --signal=B:USR1@300
set -euo pipefail

port=6379
reason="" step="" place="" token=""

fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

# shellcheck disable=SC2329
clean() {
    rm -rf "$place" "$token"
}
trap clean EXIT

# SIGTERM for the program only: Ray's processes must live until it has saved.
# shellcheck disable=SC2329
stop() {
    reason=$1
    if [[ -n $place && -s $place/pid ]]; then
        echo "$reason: the program saves after its step, then ends"
        kill -TERM "$(<"$place/pid")" 2>/dev/null || true # it may have ended by itself
    elif [[ -n $step ]]; then
        kill -TERM "$step" 2>/dev/null || true
    else
        fail "$reason before the program has begun" 143
    fi
}
trap 'stop "the time limit is near"' USR1
trap 'stop "asked to stop"' TERM

# What a run needs, before anything starts.
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no Slurm job; submit it: sbatch -N NODES -t TIME $0 ..." 2
[[ -d .venv/bin ]] && export PATH=$PWD/.venv/bin:$PATH
for tool in ray python srun scontrol; do
    command -v "$tool" >/dev/null || fail "no '$tool' on $(hostname); submit in a checkout with .venv ('make setup')" 2
done
config=$(python -m rlhf_dist.main --print-config "$@") || exit $?
from_config() { python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run"][sys.argv[1]] or "")' "$1" <<<"$config"; }
name=$(from_config name) runs=$(from_config root)
[[ -n $name ]] || fail "run.name is not set: without a fixed name a job that is queued again would begin anew" 2
mkdir -p "$runs" || fail "run.root=$runs cannot be made on $(hostname); give a folder that all nodes see" 2
runs=$(cd "$runs" && pwd)

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ ${SLURMD_NODENAME:-} == "${hosts[0]}" ]] ||
    fail "this script runs on ${SLURMD_NODENAME:-?}, and not on the first node, ${hosts[0]}"
if ((${#hosts[@]} == 1)); then
    address=127.0.0.1
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # one node: Ray listens on loopback only
else
    address=$(getent ahostsv4 "${hosts[0]}" | awk '$1 !~ /^127\./ { print $1; exit }')
    [[ -n $address ]] ||
        fail "${hosts[0]} has no address but loopback in its /etc/hosts or DNS; the other nodes must be able to reach it"
fi
(exec 3<>"/dev/tcp/$address/$port") 2>/dev/null &&
    fail "port $port of ${hosts[0]} is in use; does another Ray cluster run there?"

# A token of this job's own, which only its user can read: others on the network cannot use its Ray ports. Never on a
# command line, which everybody on a node can see.
token=$runs/.ray-token-$SLURM_JOB_ID
rm -f "$token"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$token")
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
place=$(mktemp -d)

everywhere=(srun --nodes="${#hosts[@]}" --ntasks="${#hosts[@]}" --ntasks-per-node=1
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1)
# shellcheck disable=SC2016
"${everywhere[@]}" bash -c '
    for file in "$@"; do
        [[ -r $file ]] && continue
        echo "error: $(hostname) cannot read $file; checkout and run.root must be on a file system of all nodes" >&2
        exit 1
    done' check "$(command -v ray)" "$token" </dev/null || fail "not every node can take part; see above" 2

start=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "job $SLURM_JOB_ID, start $start: nodes ${hosts[*]}, Ray at $address:$port, run folder $runs/$name"

# Where the program's process id and exit status are left, since srun's is the worst of all nodes', and
# `ray symmetric-run` exits with 0 when Ray does not start.
# shellcheck disable=SC2016
program='(echo "$BASHPID" >"$1/pid" && exec "${@:2}"); status=$?; echo "$status" >"$1/status"; exit "$status"'
# Each node offers what the job has of it; Ray would offer the whole machine.
# shellcheck disable=SC2016
node='
    options=(--num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)
    ((${SLURM_MEM_PER_NODE:-0})) && options+=(--object-store-memory=$((SLURM_MEM_PER_NODE * 1024 * 1024 * 3 / 10)))
    exec ray symmetric-run --address="$1" --min-nodes="$2" "${options[@]}" -- "${@:3}"'
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
"${everywhere[@]}" bash -c "$node" node "$address:$port" "${#hosts[@]}" \
    bash -c "$program" program "$place" env RAY_ADDRESS="$address:$port" python -m rlhf_dist.main "$@" </dev/null &
step=$!
# A signal ends `wait`, not the step.
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done

[[ -s $place/status ]] || fail "Ray did not start on every node, or the program was killed; see above"
status=$(<"$place/status")
if [[ $status -eq 130 && $reason == "the time limit is near" ]]; then
    echo "saved; job $SLURM_JOB_ID is queued again and goes on from there"
    clean # being queued again kills this script
    scontrol requeue "$SLURM_JOB_ID" || fail "Slurm does not queue it again; the same command goes on" "$status"
fi
echo "the program ended with exit status $status" # the last line, after all that `ray stop` says
exit "$status"
