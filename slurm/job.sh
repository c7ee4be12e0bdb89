# ---- The rest is the same in every job. ------------------------------------------------------------------------------
# One torchrun on each node, restarted from the newest checkpoint when it fails. Before the time is up Slurm sends this
# script SIGUSR1: it asks the run to save and stop, and queues itself again. status.json says how the run ended: torchrun
# turns every exit code into 1.
set -uo pipefail

task=${SLURM_ARRAY_TASK_ID:-0}
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$task} # of an array this task alone
me=${me:-$SLURM_JOB_ID}
run_dir=${run_dirs[task]} config=${configs[task]}
own=$run_dir/slurm
life=${SLURM_RESTART_COUNT:-0} attempt=0 failures=0 last=''
asked='' asked_at=0 stopping='' bad_nodes=''
mkdir -p "$run_dir/logs" "$own"
stamp=$own/started-$me
export ONECURVE_REFUSED=$own/refused-$me # where a rank that refuses to begin writes its exit code
unset SLURM_EXPORT_ENV                   # as `sbatch --export=NONE` sets it: srun would hand on nothing
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

say() { echo "onecurve: $(date '+%F %T') job $me, life $life, attempt $attempt: $*"; }
newest() { ls "$run_dir/checkpoints" 2>/dev/null | grep -E '^step-[0-9]+$' | sort | tail -n 1; }
# A value in a JSON file of the run; none if the file is older than this attempt.
told() { [ "$run_dir/$1" -nt "$stamp" ] && sed -nE "s/.*\"$2\": \"?([^\",}]*).*/\1/p" "$run_dir/$1"; }
sentence() { [ "$run_dir/$1" -nt "$stamp" ] && sed -nE "s/.*\"$2\": \"([^\"]*)\".*/\1/p" "$run_dir/$1"; }
cancelled() { grep -qsx "$me" "$own/cancelled"; }

trap 'asked=1 stopping=1 asked_at=$SECONDS; touch "$run_dir/STOP"' USR1
trap 'stopping=1; touch "$run_dir/STOP"' TERM # cancelled, or queued again, by somebody else

train() {
    local head port logs
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Where names of nodes do not resolve, Slurm knows their addresses.
    getent hosts "$head" >/dev/null || head=$(scontrol show node "$head" | sed -nE 's/.*NodeAddr=([^ ]+).*/\1/p')
    port=$((10000 + (SLURM_JOB_ID * 7 + attempt) % 22000)) # no other job's, and none that the kernel deals out
    logs=$run_dir/logs/job-$me/life-$life.$attempt
    mkdir -p "$logs"
    # SIGUSR1 (`scancel --signal=USR1`) is for the ranks, which listen: it would kill torchrun.
    srun --kill-on-bad-exit=1 --wait=60 ${container[@]+"${container[@]}"} \
        bash -c 'trap "" USR1; export PET_NODE_RANK=$SLURM_NODEID PET_ROLE=$SLURMD_NODENAME-; exec "$@"' bash \
        ${inside[@]+"${inside[@]}"} "$python" -m onecurve.torchrun \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$procs_per_node" --max-restarts=0 \
        --master-addr="$head" --master-port="$port" --shutdown-timeout="$lead_s" \
        --log-dir="$logs" --redirects=3 --tee=0:3 -m onecurve.rank --config "$config" &
    local srun=$!
    while kill -0 $srun 2>/dev/null; do
        if [ "$asked" ] && [ $((SECONDS - asked_at)) -gt $((lead_s * 3 / 4)) ]; then
            say "does not stop in time"
            return # queueing again ends what hangs; after the time limit there would be no other life
        elif [ "$stopping" ]; then
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
    report=$("$python" -m onecurve doctor --quick --dir "$run_dir")
    echo "$report"
    bad_nodes=$(sed -nE 's/^bad nodes: *//p' <<<"$report")
}

end() { # "$1": exit code, "$2": why. Nothing of a chain goes on, either.
    say "$2"
    rm -f "$stamp" "$ONECURVE_REFUSED" "$own/lives-$me"
    if [ -z "${SLURM_ARRAY_JOB_ID:-}" ]; then
        others=$(grep -svx "$me" "$own/jobs")
        [ -z "$others" ] || scancel --quiet --state=PENDING $others
    fi
    exit "$1"
}

queue_again() { # "$1": why
    cancelled && end 75 "$1; cancelled, not queued again"
    [ "$requeue" ] || { say "$1; launch.requeue=false: the next job of a chain goes on" && exit 75; }
    for _ in 1 2 3 4 5; do
        if scontrol requeue "$me"; then
            say "$1; queued again${bad_nodes:+ without $bad_nodes}"
            if [ "$bad_nodes" ]; then
                exclude=$(scontrol show job "$me" | sed -nE 's/.*ExcNodeList=([^ (]+).*/\1/p')
                scontrol update JobId="$me" ExcNodeList="${exclude:+$exclude,}$bad_nodes"
            fi
            exit 75
        fi
        sleep 5
    done
    say "$1; Slurm does not queue it again: sbatch the script to go on"
    exit 75
}

if [ "$life" = 0 ]; then
    grep -qsx "$me" "$own/jobs" || echo "$me" >>"$own/jobs" # submitted again by hand
fi
# However a life ended: how many there were since the last new checkpoint.
lives=0 before=''
[ ! -e "$own/lives-$me" ] || read -r before lives <"$own/lives-$me"
now=$(newest)
if [ "${now:-none}" = "$before" ]; then lives=$((lives + 1)); else lives=0; fi
echo "${now:-none} $lives" >"$own/lives-$me"
[ "$lives" -le "$restarts" ] || end 4 "no new checkpoint in $lives lives of the job"

check_nodes
[ -z "$bad_nodes" ] || queue_again "$bad_nodes failed the check"
while :; do
    cancelled && end 75 "cancelled"
    before=$(newest)
    rm -f "$ONECURVE_REFUSED"
    touch "$stamp"
    [ "$stopping" ] || train
    state=$(told status.json state)
    [ "$state" != finished ] || end 0 "finished"
    case $(sentence status.json reason) in *SIGUSR1*) asked=1 ;; esac
    if [ "$(told logs/failure.json retry)" = false ]; then
        end "$(told logs/failure.json exit_code)" "failed for good"
    fi
    # What was right at first is wrong later for a reason that may pass.
    if [ $attempt = 0 ] && [ "$life" = 0 ] && [ -s "$ONECURVE_REFUSED" ]; then
        end "$(cat "$ONECURVE_REFUSED")" "refused"
    fi
    [ -z "$asked" ] || queue_again "stopped as asked"
    [ -z "$stopping" ] && [ "$state" != interrupted ] || { say "stopped" && exit 75; }
    [ "$(newest)" = "$before" ] || failures=0 last=''
    cause=$(told logs/failure.json step):$(sentence logs/failure.json cause)
    [ "$cause" = : ] || [ "$cause" != "$last" ] || end 4 "the same failure twice at step ${cause%%:*}"
    last=$cause
    failures=$((failures + 1))
    [ $failures -le "$restarts" ] || end 4 "no new checkpoint in $restarts restarts"
    check_nodes
    [ -z "$bad_nodes" ] || queue_again "failed, and $bad_nodes did not pass the check"
    attempt=$((attempt + 1))
    say "restart $failures of $restarts"
    sleep $failures
done
