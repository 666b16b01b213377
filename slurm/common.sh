# Sourced by the scripts of this folder, which sbatch starts in the folder where it was called (cd there first).
# Environment: VENV=.venv  MAX_RESTARTS=20 (of a job whose processes died; saved stops are not counted)

[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: $0: not a SLURM job. Start it by: sbatch $0" >&2; exit 2; }
VENV=${VENV:-.venv}
[ -x "$VENV/bin/chameleon" ] || { echo "error: $VENV/bin/chameleon: not there. Set VENV to the environment of the project." >&2; exit 2; }
export PATH="$(cd "$VENV/bin" && pwd):$PATH"
export PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1 # starts tensor parallelism's communication in time
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# NCCL over several nodes. Leave these to NCCL until it picks the wrong card; `NCCL_DEBUG=INFO` prints what it picked.
#   NCCL_SOCKET_IFNAME=ib0        the card over which the processes first find each other
#   NCCL_IB_HCA=mlx5_0,mlx5_1     the InfiniBand cards for the data, one a GPU; NCCL_IB_DISABLE=1 falls back to TCP
#   NCCL_NET_GDR_LEVEL=PHB        how far a card may be from a GPU and still read its memory
# A collective that hangs ends after 10 minutes, within megatron-core's groups after 30. What each rank was waiting for is then
# in logs/NAME-JOB-nccl-rankN, for `torchfrtrace`.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000

# SLURM tells the script, too, that it ends the job. A run that could not save before the limit comes back only if told to.
on_term() {
    case $(squeue -h -j "$SLURM_JOB_ID" -o '%T %r') in
        RUNNING*) return ;; # nothing has ended yet: the grace time of a preemption
        *TimeLimit) scontrol requeue "$1" ;;
    esac
    over=yes
}

# Run a command on every task of the job, a log file a rank; then end the job, or put it back into the queue.
#   0 done; 2 a mistake, which a restart would repeat; 75 saved on a signal; anything else: a process or a node died.
run_in_job() {
    local restarts=${SLURM_RESTART_COUNT:-0} logs=${LOGS:-logs} code=0 over=
    # of an array its one task: the number of one of its jobs is the number of the whole array
    local self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    self=${self:-$SLURM_JOB_ID}
    mkdir -p "$logs"
    printf '%s  job %s, restart %s, on %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$restarts" "$SLURM_JOB_NODELIST"
    printf 'command: srun %s\n' "$(printf '%q ' "$@")"
    local log="$logs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
    export TORCH_FR_DUMP_TEMP_FILE="$log-nccl-rank"
    # in the background, as bash does not look at signals while it waits for what runs in front
    trap 'on_term "$self"' TERM
    srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/%x-%j-rank%t.log" "$@" >"$log-srun.log" 2>&1 &
    while kill -0 $! 2>/dev/null; do wait $! || true; done
    wait $! || code=$?
    trap - TERM
    cat "$log-srun.log"
    # the code is the highest of all: ranks that were ended because another one ended with 2 have 143
    ! grep -q 'Exited with exit code 2$' "$log-srun.log" || code=2
    printf '%s  ended with exit code %s\n' "$(date +%FT%T)" "$code"
    [ -z "$over" ] || exit "$code" # SLURM has decided
    case $code in
        0) ;;
        2) grep -h '^error: ' "$log-rank"*.log | tail -n 1 || true ;;
        75) scontrol requeue "$self"; sleep 60 ;; # SLURM ends this script meanwhile
        *)
            tail -n 3 "$log-rank"*.log || true
            date +%FT%T >>"$log-deaths.log"
            if [ "$(wc -l <"$log-deaths.log")" -le "${MAX_RESTARTS:-20}" ]; then
                scontrol requeue "$self"
                sleep 60
            fi
            ;;
    esac
    exit "$code"
}
