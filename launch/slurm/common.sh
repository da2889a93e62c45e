# shellcheck shell=bash
# Sourced by the .sbatch files beside it: the rendezvous address, and the job's one step, which is
# stopped before the time limit and requeued. Nothing here needs ssh or pdsh.
#
# SLURM's settings are changed on the command line, also for arrays:
#   sbatch --nodes=4 --time=12:00:00 --partition=gpu FILE FLAGS
# Optional environment variables, set in the shell of sbatch:
#   PYTHON        the Python to use (default: the active environment's, else the checkout's .venv)
#   VICO_RANKS    ranks per node (default: one per GPU)
#   VICO_ROOT     the checkout, where FILE is a copy outside of it
#   MASTER_PORT   the port of the rendezvous (default: derived from the job number)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
#                 the network interface between the nodes (eth0, ib0; see `ip -brief address`).
#                 Needed where a start asks for it: mostly because a node resolves its own name to
#                 127.0.1.1 in /etc/hosts, or because it has several networks.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
find_python

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The usual port, 29500, would be taken where two jobs share a node.
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Without PYTHONUNBUFFERED the lines of several ranks mix.
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
remedy="set MASTER_ADDR to a name of it that all nodes resolve"
getent hosts "$MASTER_ADDR" >/dev/null ||
    fail "the first node, $MASTER_ADDR, cannot be resolved on $(hostname); $remedy"

ranks_per_node=${VICO_RANKS:-${SLURM_GPUS_ON_NODE:-1}}
# Without OMP_NUM_THREADS every rank uses all cores (srun), or one (torchrun).
tasks=${SLURM_NTASKS_PER_NODE:-1} cores=${SLURM_CPUS_PER_TASK:-1}
ranks_per_task=$((ranks_per_node > tasks ? ranks_per_node / tasks : 1))
threads=$((cores > ranks_per_task ? cores / ranks_per_task : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

step='' stop_requested=''
# Traps use builtins only: bash 5.2 can die of a second signal while a trap runs $(...).
# USR1 comes 2 to 3 minutes before the time limit; srun passes it on to its tasks.
trap 'stop_requested=1; [[ -z $step ]] || kill -USR1 "$step"' USR1
# TERM (scancel, scontrol requeue) reaches the ranks too: wait for them.
trap : TERM

# A file may redefine it: called after the step, with VICO_EXIT_CODE, unless the job is requeued.
at_end() { :; }

# run COMMAND...: the job's one step. Ends the script with its exit code, or requeues the job.
run() {
    local code=0
    if [[ -z $stop_requested ]]; then
        # The tasks start with USR1 ignored: it goes to all processes of a step, and would kill
        # torchrun, and a rank that has no handler yet. Without kill-on-bad-exit the other ranks
        # wait for one that has failed.
        srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
            bash -c 'trap "" USR1; exec "$@"' task "$@" &
        step=$!
        wait_for_step || code=$?
    fi
    # The exit code does not tell that the ranks stopped and saved: a rank's 75 becomes 143 when
    # srun ends the others, and 1 under torchrun. But a rank that is told to stop saves first.
    if [[ $stop_requested && ($code != 0 || -z $step) ]]; then
        say "stopped before the time limit; the job is requeued, and resumes from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID" # the last command: it makes SLURM end this script
    fi
    VICO_EXIT_CODE=$code at_end || true
    exit "$code"
}

# Ends with the step's exit code. `wait` returns early when a trap has run. USR1 is repeated, as a
# rank ignores it until its handler is installed.
wait_for_step() {
    local seconds=0
    while kill -0 "$step" 2>/dev/null; do
        if [[ -z $stop_requested ]]; then
            wait "$step" || true
        else
            sleep 1
            ((++seconds % 10)) || kill -USR1 "$step" 2>/dev/null || true
        fi
    done
    wait "$step"
}
