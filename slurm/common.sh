# shellcheck shell=bash
# Functions of all job scripts.

fail() {
    echo "opd: error: $*" >&2
    exit 2
}

say() {
    echo "opd: $*" >&2
}

# Set the environment of all processes of the job, or fail in one line.
prepare() {
    if [ -n "${SETUP:-}" ]; then
        [ -f "$SETUP" ] || fail "SETUP: no file '$SETUP'; give one with the lines that make 'opd' known"
        set +eu # the user's file may need unset variables and failing commands
        # shellcheck disable=SC1090
        source "$SETUP"
        set -eu
    fi
    command -v opd >/dev/null ||
        fail "no 'opd' on the PATH; activate its environment before sbatch, or in a file given as SETUP"
    export PYTHONUNBUFFERED=1                  # the log is written without delay
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes rarely reach the internet
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch
    if [ -n "${INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
    fi
}

# Set `settings`: options of `opd fit` for CONFIG, RUN and the index in a job array, for starting or
# resuming, and for saving and requeueing on SIGUSR1.
read_run() {
    local file part
    [ -n "${CONFIG:-}" ] || fail "CONFIG: got none, expected a YAML file, such as configs/opd.yaml"
    settings=(--ckpt_path last)
    for file in $CONFIG; do
        [ -f "$file" ] || fail "CONFIG: no file '$file' in $PWD"
        settings+=(--config "$file")
    done
    for part in callbacks.SlurmRequeue callbacks.RngState; do
        # shellcheck disable=SC2086 # the files are words
        grep -q "^[^#]*${part/./\\.}" $CONFIG || settings+=("--trainer.callbacks+=$part")
    done
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        [ -n "${RUN:-}" ] || fail "RUN: got none; the runs of an array need it: RUN-0, RUN-1 and so on"
        RUN=$RUN-$SLURM_ARRAY_TASK_ID
        settings+=(--seed_everything "$SLURM_ARRAY_TASK_ID")
    fi
    if [ -n "${RUN:-}" ]; then
        # A folder that the config names itself would win over that of its loggers.
        settings+=(--trainer.default_root_dir "$RUN" --trainer.logger.init_args.save_dir "$RUN")
    fi
}

# Set GPUS_PER_NODE, one for each task of the node; 0 leaves the accelerator to the config.
count_gpus() {
    [ -z "${SLURM_GPUS_PER_TASK:-}" ] ||
        fail "sbatch --gpus-per-task hides a rank's GPUs from it; give --gpus-per-node"
    GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [ -n "$GPUS_PER_NODE" ] ||
        fail "no GPUs in this job; give sbatch --gpus-per-node, or GPUS_PER_NODE=0 to do without"
    if [ "$GPUS_PER_NODE" != 0 ]; then
        [ "$GPUS_PER_NODE" = "$SLURM_NTASKS_PER_NODE" ] ||
            fail "a node has $GPUS_PER_NODE GPUs for $SLURM_NTASKS_PER_NODE tasks, expected one" \
                "each; give sbatch as many --ntasks-per-node as --gpus-per-node"
        settings+=(--trainer.accelerator gpu)
    fi
}

announce() {
    say "job $SLURM_JOB_ID, nodes $SLURM_JOB_NODELIST with $SLURM_NTASKS_PER_NODE tasks each," \
        "run folder ${RUN:-as in $CONFIG}, restart ${SLURM_RESTART_COUNT:-0}"
}

# Print the first of 16 ports for this job, different from those of other jobs on the node: below the
# kernel's ephemeral ports, above the rendezvous ports of ranks.
first_port() {
    echo $((25000 + SLURM_JOB_ID % 480 * 16))
}

# Replace a task of srun by a server: name, port, options of `opd serve`.
serve() {
    local name=$1 port=$2
    shift 2
    trap '' USR1 # sent to all processes of a job; only trainers handle it
    exec opd serve --host "$(hostname)" --port "$port" \
        --key_file "$FOLDER/key" --address_file "$FOLDER/$name.address" "$@"
}
