#!/bin/bash
# A SLURM cluster of two virtual nodes on this host, for the tests: two slurmd under names of their own, one slurmctld,
# one munged. Needs root and Debian's slurm-wlm, slurm-wlm-basic-plugins, munge, libpmix2, libpmix-dev; no systemd.
#
#   up.sh [FOLDER]     everything of the cluster is in FOLDER; prints the SLURM_CONF to export
#
# A second call finds what runs already. down.sh takes it all down. Each node has a host name of its own, by a UTS
# namespace, where root may make one (a container needs CAP_SYS_ADMIN); else both have this host's.
set -euo pipefail
folder=$(realpath -m "${1:-${KFAC_DIST_SLURM:-/tmp/kfac-dist-slurm}}")
nodes=(kfac1 kfac2)
cpus=4 # per node: what SLURM believes, whatever this host has
host=$(hostname)
hosts=("$host" "$host")
unshare --uts hostname "${nodes[0]}" 2>/dev/null && hosts=("${nodes[@]}")
# shellcheck source=tests/slurm/running.sh
source "$(dirname "${BASH_SOURCE[0]}")/running.sh"

for program in slurmctld slurmd munged sbatch; do
  command -v "$program" >/dev/null || {
    echo "$program is missing: apt-get install slurm-wlm slurm-wlm-basic-plugins munge libpmix2 libpmix-dev" >&2
    exit 1
  }
done
((EUID == 0)) || { echo "this needs root: slurmd starts jobs as their users" >&2; exit 1; }

mkdir -p "$folder"/{pid,log,state}
chmod 755 "$folder" "$folder"/*/
for node in "${nodes[@]}"; do
  mkdir -p "$folder/spool-$node" "$folder/tmp-$node"
  # srun and torchrun look the names up.
  grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node # kfac-dist tests" >>/etc/hosts
done

if [[ ! -s $folder/munge.key ]]; then
  (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
fi
cat >"$folder/slurm.conf" <<CONF
ClusterName=kfac-dist-tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16827
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long a credential lives is also how long a requeued job waits.
AuthInfo=socket=$folder/munge.sock,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
TmpFS=$folder/tmp-%n
SlurmctldPidFile=$folder/pid/slurmctld
SlurmdPidFile=$folder/pid/slurmd-%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
# Ended jobs stay visible to scontrol for the whole test run.
MinJobAge=3600
KillWait=5
ReturnToService=2
PropagateResourceLimits=NONE
# The nodes may have more cores and memory than the host.
SlurmdParameters=config_overrides
NodeName=${nodes[0]} NodeHostname=${hosts[0]} NodeAddr=127.0.0.1 Port=17011 CPUs=$cpus RealMemory=4000
NodeName=${nodes[1]} NodeHostname=${hosts[1]} NodeAddr=127.0.0.1 Port=17012 CPUs=$cpus RealMemory=4000
PartitionName=tests Nodes=${nodes[0]},${nodes[1]} Default=YES State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

running "$folder/pid/munged" munged || {
  rm -f "$folder/munge.sock" "$folder/munge.sock.lock"
  munged --socket="$folder/munge.sock" --key-file="$folder/munge.key" --pid-file="$folder/pid/munged" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
}
running "$folder/pid/slurmctld" slurmctld || slurmctld
for node in "${nodes[@]}"; do
  running "$folder/pid/slurmd-$node" slurmd && continue
  if [[ ${hosts[0]} == "$host" ]]; then
    slurmd -N "$node"
  else
    # shellcheck disable=SC2016  # $1 is the inner shell's
    unshare --uts bash -c 'hostname "$1" && exec slurmd -N "$1"' slurmd "$node"
  fi
done

for ((attempt = 0; attempt < 150; attempt++)); do
  if (($(sinfo --noheader --Node --format=%T 2>/dev/null | grep -cx -e idle -e mixed -e allocated) == ${#nodes[@]})); then
    echo "export SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 0.2
done
echo "the nodes did not come up within 30 s:" >&2
sinfo --Node --long >&2 || true
tail -n 20 "$folder"/log/*.log >&2
exit 1
