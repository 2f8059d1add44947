# shellcheck shell=bash
# Placement, start, supervision and shutdown of servers beside a trainer in one job.
# Each server is a separate job step with separate CPUs and GPUs (srun --exact).

names=() nodes=() widths=() # name, node and number of tasks of each server
processes=()                # process of its srun
trainer=

# Check that a variable is a whole number; set its default.
number() {
    local value=${!1:-$2}
    [[ $value =~ ^[0-9]+$ ]] || fail "$1: got '$value', expected a whole number"
    printf -v "$1" %s "$value"
}

# Assign servers to nodes, from the first that they may use; the trainer gets the rest.
place_servers() {
    local node=0 used=0 room=$((SLURM_NTASKS_PER_NODE - 1)) kind i
    local -A number=([rollouts]=$ROLLOUT_SERVERS [teachers]=$TEACHER_SERVERS)
    local -A width=([rollouts]=$ROLLOUT_GPUS [teachers]=$TEACHER_GPUS)
    [ "$GPUS_PER_NODE" = 0 ] || [ -n "${SLURM_GPUS_ON_NODE:-}" ] ||
        fail "no GPUs in this job that SLURM could divide; give sbatch --gpus-per-node"
    if ((SERVER_NODES > 0)); then
        node=$((SLURM_NNODES - SERVER_NODES)) room=$SLURM_NTASKS_PER_NODE
        ((node > 0)) || fail "SERVER_NODES: got $SERVER_NODES of $SLURM_NNODES nodes, which leaves none to train on"
    elif ((SLURM_NNODES > 1)); then
        fail "SERVER_NODES: got 0 in a job of $SLURM_NNODES nodes, expected at least 1"
    fi
    trainer_nodes=$((SERVER_NODES > 0 ? node : 1))
    for kind in rollouts teachers; do
        for ((i = 0; i < number[$kind]; i++)); do
            if ((used > 0 && used + width[$kind] > room)); then
                node=$((node + 1)) used=0
            fi
            used=$((used + width[$kind]))
            ((used <= room && node < SLURM_NNODES)) ||
                fail "no room for server $kind-$i of ${width[$kind]} tasks; give sbatch more" \
                    "--ntasks-per-node (now $SLURM_NTASKS_PER_NODE), or more nodes and SERVER_NODES"
            names+=("$kind-$i") nodes+=("$node") widths+=("${width[$kind]}")
        done
    done
    trainer_tasks=$((SERVER_NODES > 0 ? SLURM_NTASKS_PER_NODE : SLURM_NTASKS_PER_NODE - used))
}

# Print the address files of the servers of a kind as YAML.
addresses() {
    local name list=
    for name in "${names[@]}"; do
        [[ $name != "$1"-* ]] || list+=${list:+,}$FOLDER/$name.address
    done
    echo "[$list]"
}

# Replace this shell by a job step: name, first node, nodes, tasks per node, shares of a task, command.
# --mem=0 gives each step all of the job's memory.
step() {
    local name=$1 first=$2 many=$3 tasks=$4 shares=$5 gpus=()
    shift 5
    if [ "$GPUS_PER_NODE" != 0 ]; then gpus=(--gpus-per-node=$((tasks * shares))); fi
    unset SLURM_MEM_PER_NODE SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SRUN_CPUS_PER_TASK
    exec srun --exact --mem=0 "${gpus[@]}" --job-name="$name" --kill-on-bad-exit=1 \
        --relative="$first" --nodes="$many" --ntasks=$((many * tasks)) \
        --ntasks-per-node="$tasks" --cpus-per-task=$((shares * ${SLURM_CPUS_PER_TASK:-1})) "$@"
}

log_of() {
    echo "$SLURM_JOB_NAME-$SLURM_JOB_ID-$1.log"
}

# Run server i, with options of `opd serve`.
start_server() {
    local i=$1 name=${names[$1]} port=0
    shift
    if ((i < 16)); then port=$(($(first_port) + i)); fi
    # shellcheck disable=SC2016 # the task expands it
    step "$name" "${nodes[i]}" 1 1 "${widths[i]}" \
        --output="$(log_of "$name")" --open-mode=append \
        bash -c 'source slurm/common.sh; serve "$@"' server "$name" "$port" \
        --tensor_parallel_size "${widths[i]}" "$@" &
    processes+=($!)
}

# Run the trainer, with options of `opd fit`.
start_trainer() {
    step train 0 "$trainer_nodes" "$trainer_tasks" 1 \
        opd fit "$@" --trainer.num_nodes "$trainer_nodes" --trainer.devices "$trainer_tasks" &
    trainer=$!
}

# Return 0 if the server of an address file answers.
answers() {
    local place host
    [ -s "$1" ] || return
    place=$(<"$1")
    place=${place#http://} host=${place%:*}
    # shellcheck disable=SC2016 # the shell with the time limit expands them
    timeout 5 bash -c '
        exec 3<>"/dev/tcp/$0/$1" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && read -r _ code _ <&3
        [ "$code" = 200 ]' "${host//[\[\]]/}" "${place##*:}" 2>/dev/null
}

await_servers() {
    local name until=$((SECONDS + START_SECONDS))
    for name in "${names[@]}"; do
        until answers "$FOLDER/$name.address"; do
            check_servers
            ((SECONDS < until)) || give_up "$name" "does not answer after $START_SECONDS s"
            sleep 1
        done
        say "server $name answers at $(<"$FOLDER/$name.address")"
    done
}

# End the job when a server ends: a new one would not have the pushed weights.
check_servers() {
    local i
    for i in "${!processes[@]}"; do
        kill -0 "${processes[i]}" 2>/dev/null || give_up "${names[i]}" "has ended"
    done
}

give_up() {
    local log
    log=$(log_of "$1")
    say "error: server $1 $2; the end of $log: $(grep -v '^ *$' "$log" 2>/dev/null | tail -n 1)"
    if [ -n "$trainer" ]; then # lets it save a checkpoint
        scancel --signal=TERM "$SLURM_JOB_ID.$(step_number train)"
        await_end "$SAVE_SECONDS" "$trainer"
    fi
    exit 1
}

step_number() {
    squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format="%i %j" |
        sed -n "s/^[0-9_]*\.\([0-9]*\) $1\$/\1/p"
}

# Return 0 if the processes end within the given seconds.
await_end() {
    local until=$((SECONDS + $1))
    shift
    while kill -0 "$@" 2>/dev/null; do
        ((SECONDS < until)) || return
        sleep 0.5
    done
}

# At the end of the job: terminate, then kill all steps; delete key, addresses and pushed weights.
end_steps() {
    local process
    trap '' TERM
    scancel --quiet --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true
    for process in "${processes[@]}" $trainer; do
        await_end 20 "$process" || kill "$process" # srun then kills its step
    done
    wait
    rm -rf "$FOLDER"
}
