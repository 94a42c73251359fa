#!/usr/bin/env bash
# Trains under SLURM, one process per GPU. If time runs out or it is preempted, it is queued again:
#
#     sbatch --nodes=4 launch/slurm.sh --config=configs/gpt2_124m.py --workdir=SHARED_FOLDER
#
# Run it in the repository, with the virtual environment active. If nodes do not have 8 GPUs, add
# for example --ntasks-per-node=4 --gpus-per-node=4. jax.distributed connects the processes by
# SLURM's environment variables. It assigns GPU i to the task with local number i, so a task must see
# all GPUs of its node (no --gpus-per-task).

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
stopped=75 # The exit status of a run that was stopped on request, with everything saved.

# SLURM signals this shell 120 s before the time is up, and the shell signals the tasks. It sends
# SIGINT: on preemption SLURM may have sent SIGTERM to the tasks already, and a second one could end
# them at once, while a first SIGINT does not. (SIGTERM to srun itself would kill the tasks.)
trap 'trap "" TERM; scancel --signal=INT "$SLURM_JOB_ID"' TERM

# A task that ends must not end others that are still saving. If one dies, jaxdp ends the others.
srun --kill-on-bad-exit=0 python -u -m jaxdp.train "$@" &
step=$!

# A signal interrupts `wait`, which then does not return the status of srun.
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done

# The status of srun is the highest of its tasks. A job that a user has canceled is not RUNNING, and
# must not be queued again. If a node fails, SLURM itself queues the job again.
if ((status == stopped)) && [[ $(squeue --noheader --job="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
