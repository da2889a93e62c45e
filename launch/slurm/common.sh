# shellcheck shell=bash
# Sourced by the .sbatch files beside it, once they have found the checkout: who meets where, and one step that is asked to
# stop before the time limit and put into the queue again. Nothing here needs ssh or pdsh.
#
# What SLURM decides is changed on the command line, also in arrays: sbatch --nodes=4 --time=12:00:00 --partition=gpu FILE FLAGS.
# Environment, all optional: PYTHON (else the active environment's, else the checkout's .venv); VICO_RANKS, ranks per node (else one
# per GPU); VICO_ROOT, the checkout, where FILE is a copy that lies elsewhere; MASTER_PORT.
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface between the nodes (ip -brief address shows them: eth0, ib0).
# They are needed where a start says so, mostly because a node's own name leads to 127.0.1.1 in its /etc/hosts, or because it has
# several networks. Set in the shell of sbatch, all of these reach the job.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
find_python

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # 29500 would be taken when two jobs share a node
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1             # or lines of several ranks mix
getent hosts "$MASTER_ADDR" >/dev/null ||
    fail "the first node, $MASTER_ADDR, has no address that $(hostname) knows; set MASTER_ADDR to one that all nodes know"

ranks_per_node=${VICO_RANKS:-${SLURM_GPUS_ON_NODE:-1}}
# Without OMP_NUM_THREADS every rank takes all cores (srun), or one (torchrun).
ranks_per_task=$((ranks_per_node > ${SLURM_NTASKS_PER_NODE:-1} ? ranks_per_node / ${SLURM_NTASKS_PER_NODE:-1} : 1))
threads=$((${SLURM_CPUS_PER_TASK:-1} > ranks_per_task ? ${SLURM_CPUS_PER_TASK:-1} / ranks_per_task : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

step='' asked=''
# Traps are builtins only: bash 5.2 can die of a second signal that comes while a trap runs $(...).
trap 'asked=1; [[ -z $step ]] || kill -USR1 "$step"' USR1 # 2 to 3 minutes before the limit; srun passes it on to its tasks
trap : TERM                                               # scancel, scontrol requeue: the ranks have heard it too; wait for them

at_end() { :; } # what a file does behind its step, with VICO_EXIT_CODE, unless the job goes back into the queue

# run COMMAND...: the job's one step. Ends the script with its code, or puts the job back into the queue.
run() {
    local code=0
    if [[ -z $asked ]]; then
        # The tasks begin with USR1 ignored: it goes to all processes of a step, and would kill torchrun, and a rank that does not
        # listen yet. Without kill-on-bad-exit the other ranks wait for one that has failed.
        srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
            bash -c 'trap "" USR1; exec "$@"' task "$@" &
        step=$!
        wait_for_step || code=$?
    fi
    # Exit codes say little (75 of a rank becomes 143 when srun ends the others, 1 under torchrun). A rank that is asked to stop saves first.
    if [[ $asked && ($code != 0 || -z $step) ]]; then
        say "stopped before the time limit; the job goes back into the queue and on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID" # the last command: SLURM ends this script for it
    fi
    VICO_EXIT_CODE=$code at_end || true
    exit "$code"
}

# The step's exit code. `wait` ends early when a trap has run. A rank that was too young to listen when it was asked is asked again.
wait_for_step() {
    local seconds=0
    while kill -0 "$step" 2>/dev/null; do
        if [[ -z $asked ]]; then
            wait "$step" || true
        else
            sleep 1
            ((++seconds % 10)) || kill -USR1 "$step" 2>/dev/null || true
        fi
    done
    wait "$step"
}
