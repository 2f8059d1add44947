#!/usr/bin/env bash
# A real SLURM for as long as a command runs:  cluster.sh FOLDER NODES COMMAND...
#
# Nodes n1, n2, ... have a host name and an address of their own on a private network, so that ranks
# find each other as they would on a cluster.  Everything lives in namespaces whose first process is
# this script: when it ends, however it ends, the kernel ends every daemon and every job.  Outside of
# FOLDER, which must be an absolute path, nothing is written.  Jobs have no other network.
#
# Meanwhile `nsenter --all --target "$(cat FOLDER/pid)"` enters the controller's machine.
# Needs root, unshare, ip, and the packages slurm-wlm and munge; no systemd, no cgroups.
set -euo pipefail

folder=$1 nodes=$2
network=10.77.0

if [ -z "${INSIDE_CLUSTER:-}" ]; then
  mkdir -p "$folder"
  # unshare is deaf to signals while it waits, so this shell waits for it and takes it down.
  INSIDE_CLUSTER=yes unshare --mount --uts --net --pid --fork --kill-child --mount-proc \
    "$BASH" "$0" "$@" <&0 &
  inside=$!
  trap 'kill -KILL "$inside" 2>/dev/null || true' EXIT
  trap 'exit 143' TERM
  trap 'exit 130' INT HUP
  until pid=$(cat "/proc/$inside/task/$inside/children") && [ -n "$pid" ]; do sleep 0.01; done
  echo "${pid% }" >"$folder/pid"
  code=0
  wait "$inside" || code=$?
  exit "$code"
fi
unset INSIDE_CLUSTER
shift 2

give_up() {
  echo "cluster: $1" >&2
  tail -n 20 "$folder"/log/* >&2
  exit 1
}

# Waits up to half a minute for a condition.
await() {
  local left=600
  until "$@"; do
    ((left--)) || give_up "waited in vain for: $*"
    sleep 0.05
  done
}

mkdir -p "$folder"/{log,spool,munge}
export SLURM_CONF=$folder/slurm.conf

name_machines() {
  hostname controller
  {
    echo "127.0.0.1 localhost"
    echo "$network.254 controller"
    for i in $(seq "$nodes"); do echo "$network.$i n$i"; done
  } >"$folder/hosts"
  mount --bind "$folder/hosts" /etc/hosts
  ip link set lo up
  ip link add switch type bridge
  ip address add "$network.254/24" dev switch
  ip link set switch up
}

start_munge() {
  head -c 256 /dev/urandom >"$folder/munge/key"
  chmod 600 "$folder/munge/key"
  munged --foreground --force --num-threads=2 --socket="$folder/munge/socket" \
    --key-file="$folder/munge/key" --pid-file="$folder/munge/pid" \
    --seed-file="$folder/munge/seed" --log-file="$folder/log/munge" &>"$folder/log/munged" &
  await test -S "$folder/munge/socket"
}

# A requeued job waits as long as credentials live (default 120 s); 5 s is the least.
# Killed jobs get KillWait seconds between SIGTERM and SIGKILL.
write_configuration() {
  cat >"$SLURM_CONF" <<CONF
ClusterName=tests
SlurmctldHost=controller($network.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/spool/controller
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/spool/controller.pid
SlurmdPidFile=$folder/spool/%n.pid
SlurmctldLogFile=$folder/log/controller
SlurmdLogFile=$folder/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
JobRequeue=1
KillWait=${KILL_WAIT:-5}
ReturnToService=2
NodeName=n[1-$nodes] NodeAddr=$network.[1-$nodes] CPUs=${CPUS_PER_NODE:-4} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  mkdir -p "$folder/spool/controller"
}

# A node's machine is a process with a host name and a network card of its own.
start_node() {
  local name=n$1 address=$network.$1/24 machine here
  here=$(readlink /proc/self/ns/net)
  mkdir -p "$folder/spool/$name"
  # shellcheck disable=SC2016  # the node's shell expands them
  unshare --uts --net "$BASH" -c '
    hostname "$0"
    until ip link set card up 2>/dev/null; do sleep 0.02; done
    ip link set lo up
    ip address add "$1" dev card
    exec slurmd -D -N "$0"' "$name" "$address" &>"$folder/log/$name.out" &
  machine=$!
  # shellcheck disable=SC2329  # called by await
  is_apart() { [ "$(readlink "/proc/$machine/ns/net")" != "$here" ]; }
  await is_apart
  ip link add "port$1" type veth peer name card netns "$machine"
  ip link set "port$1" master switch up
}

# shellcheck disable=SC2329  # called by await
are_idle() {
  [ "$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l)" = "$nodes" ]
}

name_machines
start_munge
write_configuration
slurmctld -D -c &>"$folder/log/controller.out" &
for i in $(seq "$nodes"); do start_node "$i"; done
await are_idle

code=0
"$@" || code=$?
scancel --user=root 2>/dev/null || true
exit "$code"
