# Shared by the scripts in this folder, which source it. Call sbatch in the project's folder: the scripts start there.
# Environment: VENV=.venv  MAX_RESTARTS=20 (restarts of a job whose processes died; stops with a save do not count)

[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: $0: this is not a SLURM job. Start it with: sbatch $0" >&2; exit 2; }
VENV=${VENV:-.venv}
[ -x "$VENV/bin/chameleon" ] || { echo "error: $VENV/bin/chameleon: not found. Set VENV to the project's environment." >&2; exit 2; }
export PATH="$(cd "$VENV/bin" && pwd):$PATH"
export PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1 # so that communication of tensor parallelism starts in time
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# NCCL over several nodes: set these only if NCCL picks the wrong network card. `NCCL_DEBUG=INFO` prints what it picked.
#   NCCL_SOCKET_IFNAME=ib0        the card over which the processes first find each other
#   NCCL_IB_HCA=mlx5_0,mlx5_1     the InfiniBand cards for the data, one per GPU; NCCL_IB_DISABLE=1 falls back to TCP
#   NCCL_NET_GDR_LEVEL=PHB        how far a card may be from a GPU and still read its memory
# A collective that hangs ends after 10 minutes (30 minutes in megatron-core's groups). logs/NAME-JOB-nccl-rankN then says
# what each rank was waiting for; read these files with `torchfrtrace`.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000

# SLURM also sends this script a signal when it ends the job. A run that could not save in time must be requeued here.
on_term() {
    case $(squeue -h -j "$SLURM_JOB_ID" -o '%T %r') in
        RUNNING*) return ;; # nothing has ended yet: this is the grace time of a preemption
        *TimeLimit) scontrol requeue "$1" ;;
    esac
    over=yes
}

# Run a command on every task of the job, with one log file per rank. Then end the job or requeue it, by the exit code:
# 0: done. 2: a mistake, which a restart would repeat. 75: saved after a signal. Any other: a process or a node died.
run_in_job() {
    local restarts=${SLURM_RESTART_COUNT:-0} logs=${LOGS:-logs} code=0 over=
    # in an array, requeue only this task: the job number of its last task stands for the whole array
    local self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    self=${self:-$SLURM_JOB_ID}
    mkdir -p "$logs"
    printf '%s  job %s, restart %s, on %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$restarts" "$SLURM_JOB_NODELIST"
    printf 'command: srun %s\n' "$(printf '%q ' "$@")"
    local log="$logs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
    export TORCH_FR_DUMP_TEMP_FILE="$log-nccl-rank"
    # in the background, because bash does not handle signals while a foreground command runs
    trap 'on_term "$self"' TERM
    srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/%x-%j-rank%t.log" "$@" >"$log-srun.log" 2>&1 &
    while kill -0 $! 2>/dev/null; do wait $! || true; done
    wait $! || code=$?
    trap - TERM
    cat "$log-srun.log"
    # srun returns the highest code of all ranks; those that were ended because of another one's 2 have 143
    ! grep -q 'Exited with exit code 2$' "$log-srun.log" || code=2
    printf '%s  ended with exit code %s\n' "$(date +%FT%T)" "$code"
    [ -z "$over" ] || exit "$code" # SLURM is ending the job, and on_term has requeued it if needed
    case $code in
        0) ;;
        2) grep -h '^error: ' "$log-rank"*.log | tail -n 1 || true ;;
        75) scontrol requeue "$self"; sleep 60 ;; # SLURM ends this script during the sleep
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
