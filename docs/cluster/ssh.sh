#!/usr/bin/env bash
# A run on several machines by SSH, started again when a rank or a machine is lost.
#
#     docs/cluster/ssh.sh HOSTFILE --recipe swin_base_100ep --data data --output runs/mine
#
# HOSTFILE is DeepSpeed's: a line `host slots=GPUS` each; the first host is where ranks meet. Called in the project's
# folder, which has the same path everywhere, as have data and output. Each line NAME=VALUE of ./.deepspeed_env is set
# everywhere. Ctrl-C or SIGTERM lets the ranks write a checkpoint and ends with 75; the same command goes on from there.
#
# PYTHON        .venv/bin/python
# SSH           ssh
# MASTER_ADDR   the first host's name
# MASTER_PORT   29500; every restart takes the next one, as the last may not be free yet
# RESTARTS      10
set -u
(($# > 1)) || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
hostfile=$(realpath "$1") || exit 2
shift
python=${PYTHON:-.venv/bin/python}
read -ra ssh <<<"${SSH:-ssh}"
# A machine that is gone is noticed within a minute.
ssh+=(-n -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=3)
restarts=${RESTARTS:-10}
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
((${#hosts[@]})) || { echo "$hostfile names no host" >&2; exit 2; }
mapfile -t variables < <(grep -hE '^[A-Za-z_][A-Za-z0-9_]*=' .deepspeed_env 2>/dev/null)
launcher=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --log_level error
    --master_addr "${MASTER_ADDR:-${hosts[0]}}")
training=(--module sgmim_fast.pretrain "$@" --resume auto)
for host in "${hosts[@]}"; do
    "${ssh[@]}" "$host" "cd $(printf %q "$PWD") && test -x $(printf %q "$python")" ||
        { echo "$host: no SSH without a password, or no $PWD with $python" >&2; exit 2; }
done
pids=$(mktemp -d "$PWD/.launchers.XXXXXX") || exit 2
trap 'rm -rf "$pids"' EXIT

start() { # HOST NUMBER: its launcher, whose status is that of its first rank that fails
    local words
    printf -v words '%q ' env "${variables[@]}" "${launcher[@]}" --node_rank "$2" \
        --master_port $((${MASTER_PORT:-29500} + attempt)) "${training[@]}"
    exec "${ssh[@]}" "$1" "cd $(printf %q "$PWD") && echo \$\$ > $(printf %q "$pids/$2") && exec $words"
}

stop() { # the ranks, not the launchers: those would kill them after 30 s, whether the checkpoint is whole or not
    stopped=yes
    local number
    for number in "${!hosts[@]}"; do
        [[ -s $pids/$number ]] || continue
        "${ssh[@]}" "${hosts[number]}" "pkill -TERM -P \$(pgrep -d , -P $(<"$pids/$number"))" &
    done
}
stopped=
trap stop INT TERM

for ((attempt = 0; ; attempt++)); do
    rm -f "$pids"/*
    jobs=()
    for number in "${!hosts[@]}"; do
        start "${hosts[number]}" "$number" &
        jobs+=($!)
    done
    again=
    for number in "${!hosts[@]}"; do
        while :; do # a signal to this script ends `wait` before the job
            wait "${jobs[number]}"
            status=$?
            kill -0 "${jobs[number]}" 2>/dev/null || break
        done
        case $status in
            0) ;;
            69 | 75) again=$status ;;
            *) if ((status > 128)); then again=69; else mend=${mend:-$status} where=${where:-${hosts[number]}}; fi ;;
        esac
    done
    if [[ -n ${mend:-} ]]; then
        echo "$where ended with status $mend: see above, mend it, start again" >&2
        exit "$mend"
    fi
    [[ -n $again ]] || exit 0
    [[ -z $stopped ]] || exit "$again"
    ((attempt < restarts)) || { echo "given up after $restarts restarts" >&2; exit "$again"; }
    echo "status $again: starting again in 10 s ($((attempt + 1)) of $restarts)" >&2
    sleep 10
    [[ -z $stopped ]] || exit "$again"
done
