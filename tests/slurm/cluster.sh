#!/usr/bin/env bash
# A real Slurm of two nodes on this one machine, for tests: `cluster.sh start`, `cluster.sh stop`.
# Root alone can run it. Both commands may be given twice. Its configuration has to lie in the
# system's folder, since what runs inside a job does not see SLURM_CONF; another cluster's
# configuration there is left alone. `cluster.sh lose n1` ends a node and its jobs as a power cut
# would, and `cluster.sh regain n1` brings it back.
set -euo pipefail
OURS="driftbook's test cluster"
CONF=/etc/slurm
STATE=/var/lib/driftbook-slurm
GPUS=2
PARTITION=test

fail() { echo "cluster.sh: $*" >&2; exit 1; }

daemon() {  # the process of a daemon of this cluster, if it runs
    local pid
    pid=$(cat "$STATE/$1.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null || return
    grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null && return 1  # killed, and not yet collected
    echo "$pid"
}

check() {
    [ "$(id -u)" = 0 ] || fail "a cluster for tests needs root"
    if [ -e $CONF/slurm.conf ] && ! grep -q "$OURS" $CONF/slurm.conf; then
        fail "$CONF/slurm.conf is of another cluster and is left as it is"
    fi
}

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null \
        && command -v munged >/dev/null && return
    apt-get update -q >/dev/null || true  # the lists may be there already
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends slurm-wlm munge \
        >/dev/null || fail "the packages slurm-wlm and munge cannot be installed"
}

configure() {
    mkdir -p $CONF "$STATE"/{ctld,n1,n2}
    for number in $(seq 0 $((GPUS - 1))); do  # the null device, under the names of GPUs
        [ -e "$STATE/gpu$number" ] || mknod "$STATE/gpu$number" c 1 3
    done
    # a requeued job waits until its credential has run out
    cat >$CONF/slurm.conf <<END
# $OURS
ClusterName=driftbook
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=26817
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/%n
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/%n.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/%n.log
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
MinJobAge=300
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[27001-27002] CPUs=2 RealMemory=64000 Gres=gpu:$GPUS
PartitionName=$PARTITION Nodes=n[1-2] Default=YES MaxTime=60 State=UP
END
    echo "NodeName=n[1-2] Name=gpu File=$STATE/gpu[0-$((GPUS - 1))]" >$CONF/gres.conf
    echo "# $OURS" >$CONF/cgroup.conf
    if slurmd -V | grep -qE ' (2[4-9]|23\.11)'; then  # nothing here is confined by cgroups
        echo "CgroupPlugin=disabled" >>$CONF/cgroup.conf
    fi
}

start() {
    check
    install
    configure
    if ! munge -n >/dev/null 2>&1; then
        mkdir -p /run/munge && chown munge: /run/munge
        runuser -u munge -- munged
        touch "$STATE/munged"
    fi
    daemon slurmctld >/dev/null || slurmctld
    for node in n1 n2; do daemon $node >/dev/null || slurmd -N $node; done
    for _ in $(seq 60); do
        [ "$(sinfo -hN -t idle -o %N 2>/dev/null | sort -u | xargs)" = "n1 n2" ] && return
        scontrol update nodename=n1,n2 state=resume 2>/dev/null || true
        sleep 0.5
    done
    sinfo -N >&2 || true
    fail "the nodes did not come up; see $STATE/*.log"
}

lose() {
    # first what could tell the controller how the jobs ended
    kill -KILL "$(daemon "$1")" || fail "$1 does not run"
    for job in $(squeue -h -w "$1" -t running -o %A); do
        pgrep -f "^slurmstepd: \\[$job\\." | xargs -r kill -KILL
        for process in /proc/[0-9]*; do
            if tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -qx "SLURM_JOB_ID=$job"; then
                kill -KILL "${process#/proc/}" 2>/dev/null || true
            fi
        done
    done
    scontrol update nodename="$1" state=down reason="lost in a test"
}

regain() {
    daemon "$1" >/dev/null || slurmd -N "$1"
    for _ in $(seq 100); do  # it may come back by itself, and is then refused as resumed
        scontrol update nodename="$1" state=resume 2>/dev/null || true
        case $(sinfo -h -n "$1" -o %t) in idle | mix | alloc) return ;; esac  # a waiting job may be quick
        sleep 0.2
    done
    fail "$1 does not come back"
}

stop() {
    check
    if [ -e $CONF/slurm.conf ]; then
        scancel --state=pending,running --user=root 2>/dev/null || true
        for name in n1 n2 slurmctld; do
            pid=$(daemon $name) || continue
            kill "$pid"
            for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
        done
    fi
    if [ -e "$STATE/munged" ]; then kill "$(cat /run/munge/munged.pid)" || true; fi
    rm -f $CONF/slurm.conf $CONF/gres.conf $CONF/cgroup.conf
    rm -rf "$STATE"
}

"${1:?start, stop, lose NODE or regain NODE}" "${@:2}"
