#!/usr/bin/env bash
# `deepspeed --hostfile` over ssh with two host names of this machine, like a cluster without SLURM:
# trains on the toy dataset of the tests. Needs sshd, ssh and pdsh (Debian: openssh-server
# openssh-client pdsh), no root and nobody's ~/.ssh. Not in CI.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "$0")")/../.." && pwd)
source "$root/launch/common.sh"
find_python
! has_gpu || fail "this is for machines without a GPU: each name's rank 0 would take the same one"
for tool in /usr/sbin/sshd ssh ssh-keygen pdsh; do
    command -v "$tool" >/dev/null ||
        fail "$tool is missing; Debian: apt-get install openssh-server openssh-client pdsh"
done

work=$(mktemp -d)
sshd=
trap '[[ -z $sshd ]] || kill "$sshd"; rm -rf "$work"' EXIT
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=$("$python" -c "$free_port")
ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$work/id"
cat >"$work/sshd_config" <<CONF
ListenAddress 127.0.0.1:$port
HostKey $work/host_key
AuthorizedKeysFile $work/id.pub
StrictModes no
PasswordAuthentication no
PidFile none
CONF
cat >"$work/ssh_config" <<CONF
Host first second
    HostName 127.0.0.1
    Port $port
    IdentityFile $work/id
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
CONF
[[ $(id -u) != 0 ]] || mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$work/sshd_config" 2>"$work/sshd.log" &
sshd=$!
for _ in $(seq 50); do ssh -F "$work/ssh_config" first true 2>/dev/null && break; sleep 0.1; done

cd "$work"
printf 'first slots=1\nsecond slots=1\n' >hostfile
# Variables that pdsh does not pass on to the ranks.
printf 'OMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=lo\nDS_ACCELERATOR=cpu\n' >.deepspeed_env
export PYTHONPATH=$root:$root/tests DS_ACCELERATOR=cpu
make_dataset='import sys
from pathlib import Path
from support.toy_dataset import ToyData
print(*ToyData(Path(sys.argv[1])).flags)'
dataset=$("$python" -c "$make_dataset" "$work/toy")
# This tells pdsh's ssh where the keys are. The ssh by which deepspeed first tries each host cannot
# be told: hence --no_ssh_check.
export PDSH_SSH_ARGS_APPEND="-F $work/ssh_config"
PATH="$(dirname "$(command -v "$python")"):$PATH"
export PATH
master_port=$((port == 65535 ? 1024 : port + 1))
# shellcheck disable=SC2086
"$python" -m deepspeed.launcher.runner --hostfile hostfile --no_ssh_check \
    --master_addr 127.0.0.1 --master_port "$master_port" "$root/launch/train.sh" $dataset \
    --batch_size 2 --epochs 1 --warmup_epochs 0 --expect_world_size 2 --output_dir "$work/run"
tail -n 1 "$work/run/log.txt" | sed 's/^/over ssh: /'
