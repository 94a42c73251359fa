#!/usr/bin/env bash
# Trains under SLURM, a process for each GPU; stopped for time or preempted, it is queued again:
#
#     sbatch --nodes=4 launch/slurm.sh --config=configs/gpt2_124m.py --workdir=SHARED_FOLDER
#
# From the repository, with the virtual environment active. For other nodes than those of 8 GPUs say
# so: --ntasks-per-node=4 --gpus-per-node=4. The processes find each other by jax.distributed, which
# reads SLURM's variables: it gives the task with local number i the GPU i, so a task must see all
# GPUs of its node (no --gpus-per-task).

#SBATCH --job-name=jaxdp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
stopped=75 # The exit status of a run that was stopped as asked, with everything saved.

# SLURM tells this shell 120 s before the time is up, and the shell tells the tasks. On preemption
# SLURM can have sent SIGTERM to the tasks, too, and a second one would end them at once; a first
# SIGINT asks for the same and does not. (SIGTERM to srun itself would kill the tasks.)
trap 'trap "" TERM; scancel --signal=INT "$SLURM_JOB_ID"' TERM

# A task that has saved and ended must not take with it one that still writes; when one dies, jaxdp
# ends the others.
srun --kill-on-bad-exit=0 python -u -m jaxdp.train "$@" &
step=$!

# A signal interrupts `wait`, whose status is then not that of srun.
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done

# srun's status is the highest of its tasks'. A job that a user has canceled runs no longer, and must
# not come back; one whose node fails is queued again by SLURM.
if ((status == stopped)) && [[ $(squeue --noheader --job="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
