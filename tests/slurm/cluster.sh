#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, with accounting: `cluster.sh start FOLDER`, then `export SLURM_CONF=FOLDER/slurm.conf`;
# `cluster.sh stop FOLDER` ends it; `cluster.sh install` gets Debian's packages. All of it as root: node1 and node2 are added to /etc/hosts.
set -euo pipefail

NODES=(node1 node2)
PORTS=(6817 6819 3317 17011 17012) # slurmctld, slurmdbd, mariadbd, the two slurmd

install() {
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y --no-install-recommends slurm-wlm slurmdbd munge mariadb-server >/dev/null
}

wait_for() { # SECONDS COMMAND...
    local left=$(($1 * 5))
    shift
    until "$@" >/dev/null 2>&1; do
        ((left-- > 0)) || { echo "cluster.sh: gave up waiting for: $*" >&2; return 1; }
        sleep 0.2
    done
}

# Jobs are numbered from a random number: torchrun meets by it, and would join what a job of a cluster before has left.
configure() { # FOLDER
    local dir=$1
    mkdir -p "$dir"/{state,spool,log,mysql,munge}
    chmod 700 "$dir"/munge
    head -c 1024 /dev/urandom >"$dir/munge/key"
    chmod 400 "$dir/munge/key"
    cat >"$dir/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=$dir/munge/socket
DbdHost=localhost
DbdPort=${PORTS[1]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=${PORTS[2]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
LogFile=$dir/log/slurmdbd
PidFile=$dir/slurmdbd.pid
CONF
    chmod 600 "$dir/slurmdbd.conf"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=escm2rec
FirstJobId=$((1000 + RANDOM))
SlurmctldHost=localhost
SlurmctldPort=${PORTS[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=5
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=${PORTS[1]}
AccountingStoragePass=$dir/munge/socket
NodeName=${NODES[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=${PORTS[3]} CPUs=4 RealMemory=20000
NodeName=${NODES[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=${PORTS[4]} CPUs=4 RealMemory=20000
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

database() { # FOLDER
    local dir=$1 base=$1/mysql
    mariadb-install-db --no-defaults --user=root --datadir="$base/data" --auth-root-authentication-method=normal >"$dir/log/install-db" 2>&1
    mariadbd --no-defaults --user=root --datadir="$base/data" --socket="$base/socket" --pid-file="$base/pid" \
        --bind-address=127.0.0.1 --port="${PORTS[2]}" >"$dir/log/mariadbd" 2>&1 &
    local sql=(mariadb --no-defaults --user=root --socket="$base/socket")
    wait_for 60 "${sql[@]}" -e "select 1"
    "${sql[@]}" -e "create database slurm; create user slurm@'127.0.0.1' identified by 'slurm'; create user slurm@localhost identified by 'slurm';
        grant all on slurm.* to slurm@'127.0.0.1'; grant all on slurm.* to slurm@localhost"
}

start() { # FOLDER
    local dir
    dir=$(realpath -m "$1")
    for node in "${NODES[@]}"; do
        grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
    done
    configure "$dir"
    export SLURM_CONF=$dir/slurm.conf
    munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
        --log-file="$dir/log/munged" --seed-file="$dir/munge/seed"
    database "$dir"
    slurmdbd
    wait_for 60 sacctmgr --immediate show cluster
    sacctmgr --immediate --quiet add cluster escm2rec >"$dir/log/sacctmgr" 2>&1 || true
    slurmctld
    for node in "${NODES[@]}"; do slurmd -N "$node"; done
    wait_for 60 two_idle
}

two_idle() { [[ $(sinfo --noheader --Node --format=%t | sort | uniq -c | tr -s ' ') == " 2 idle" ]]; }

stop() { # FOLDER
    local dir
    dir=$(realpath -m "$1")
    for name in node1 node2 slurmctld slurmdbd munge/ mysql/; do
        local file=$dir/${name}pid
        [[ $name == */ ]] || file=$dir/$name.pid
        if [[ -f $file ]]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
}

"$@"
