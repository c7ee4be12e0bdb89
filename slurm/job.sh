# ---- The rest is the same in every job. ------------------------------------------------------------------------------
# One torchrun on each node, restarted from the newest checkpoint when it fails. Before the time is up Slurm sends this
# script SIGUSR1: it asks the run to save and stop, and queues itself again. status.json says how the run ended: torchrun
# turns every exit code into 1.
set -uo pipefail

task=${SLURM_ARRAY_TASK_ID:-0}
run_dir=${run_dirs[task]} config=${configs[task]}
life=${SLURM_RESTART_COUNT:-0} attempt=0 failures=0
asked='' stopping='' bad_nodes='' last=''
mkdir -p "$run_dir/logs" "$run_dir/slurm"
stamp=$run_dir/slurm/started-$SLURM_JOB_ID
unset SLURM_EXPORT_ENV # as `sbatch --export=NONE` sets it: srun would hand on nothing
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

say() { echo "onecurve: $(date '+%F %T') job $SLURM_JOB_ID, life $life, attempt $attempt: $*"; }
newest() { ls "$run_dir/checkpoints" 2>/dev/null | grep -E '^step-[0-9]+$' | sort | tail -n 1; }
field() { sed -nE "s/.*\"$2\": \"?([^\",}]*).*/\1/p" "$1" 2>/dev/null; }
told() { [ "$run_dir/$1" -nt "$stamp" ] && field "$run_dir/$1" "$2"; } # only if this attempt wrote the file

trap 'asked=1 stopping=1; touch "$run_dir/STOP"' USR1
trap 'stopping=1; touch "$run_dir/STOP"' TERM # cancelled, or queued again, by somebody else

train() {
    local head port logs
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Where names of nodes do not resolve, Slurm knows their addresses.
    getent hosts "$head" >/dev/null || head=$(scontrol show node "$head" | sed -nE 's/.*NodeAddr=([^ ]+).*/\1/p')
    port=$((10000 + (SLURM_JOB_ID * 7 + attempt) % 22000)) # no other job's, and none that the kernel deals out
    logs=$run_dir/logs/job-$SLURM_JOB_ID/life-$life.$attempt
    mkdir -p "$logs"
    # SIGUSR1 (`scancel --signal=USR1`) is for the ranks, which listen: it would kill torchrun.
    srun --kill-on-bad-exit=1 --wait=60 "${container[@]}" \
        bash -c 'trap "" USR1; export PET_NODE_RANK=$SLURM_NODEID PET_ROLE=$SLURMD_NODENAME-; exec "$@"' bash "${inside[@]}" \
        "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$procs_per_node" --max-restarts=0 \
        --master-addr="$head" --master-port="$port" --shutdown-timeout="$lead_s" \
        --log-dir="$logs" --redirects=3 --tee=0:3 -m trainer --config "$config" &
    local srun=$!
    while kill -0 $srun 2>/dev/null; do
        if [ "$stopping" ]; then
            touch "$run_dir/STOP" # again and again: a run that was just starting takes the first for an old one
            sleep 2
        else
            wait $srun # ends at a signal, too
        fi
    done
}

check_nodes() { # sets bad_nodes to those that fail, as n1,n2
    [ "$health_check" ] || return 0
    local report
    report=$("$python" -m launch.cli doctor --quick --dir "$run_dir")
    echo "$report"
    bad_nodes=$(sed -nE 's/^bad nodes: *//p' <<<"$report")
}

queue_again() { # "$1": why
    local lives=0 before now
    now=$(newest)
    [ ! -e "$run_dir/slurm/fruitless" ] || read -r before lives <"$run_dir/slurm/fruitless"
    if [ "$now" = "$at_birth" ]; then lives=$((lives + 1)); else lives=0; fi
    echo "${now:-none} $lives" >"$run_dir/slurm/fruitless"
    [ -e "$run_dir/slurm/cancelled" ] && say "$1; cancelled, not queued again" && exit 75
    [ "$requeue" ] || { say "$1; launch.requeue=false, not queued again" && exit 75; }
    [ "$lives" -le "$restarts" ] || { say "$1; no new checkpoint in $lives lives of the job: not queued again" && exit 4; }
    say "$1; queued again${bad_nodes:+ without $bad_nodes}"
    scontrol requeue "$SLURM_JOB_ID"
    [ -z "$bad_nodes" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${exclude:+$exclude,}$bad_nodes"
    exit 75
}

at_birth=$(newest)
check_nodes
[ -z "$bad_nodes" ] || queue_again "$bad_nodes failed the check"
while :; do
    before=$(newest)
    touch "$stamp"
    [ "$stopping" ] || train
    state=$(told status.json state)
    if [ "$state" = finished ]; then
        rm -f "$stamp" "$run_dir/slurm/fruitless"
        if [ -z "${SLURM_ARRAY_JOB_ID:-}" ]; then # the rest of a chain is not needed
            others=$(grep -vx "$SLURM_JOB_ID" "$run_dir/slurm/jobs" 2>/dev/null)
            [ -z "$others" ] || scancel --quiet --state=PENDING $others
        fi
        say "finished"
        exit 0
    fi
    case $(told status.json reason) in *SIGUSR1*) asked=1 ;; esac
    if [ "$(told logs/failure.json retry)" = false ]; then
        say "failed for good"
        exit "$(told logs/failure.json exit_code || echo 4)"
    fi
    [ -z "$asked" ] || queue_again "stopped as asked"
    [ -z "$stopping" ] && [ "$state" != interrupted ] || { say "stopped" && exit 75; }
    [ "$(newest)" = "$before" ] || failures=0 last=''
    # Names of folders and numbers differ from attempt to attempt.
    cause=$(told logs/failure.json step):$(told logs/failure.json reason | sed -E 's#/[^ ]+|[0-9]+##g')
    if [ "$cause" = "$last" ] && [ "$cause" != : ]; then
        say "the same failure twice at step ${cause%%:*}"
        exit 4
    fi
    last=$cause
    failures=$((failures + 1))
    if [ $failures -gt "$restarts" ]; then
        say "no new checkpoint in $restarts restarts"
        exit 4
    fi
    check_nodes
    [ -z "$bad_nodes" ] || queue_again "failed, and $bad_nodes did not pass the check"
    attempt=$((attempt + 1))
    say "restart $failures of $restarts"
    sleep $failures
done
