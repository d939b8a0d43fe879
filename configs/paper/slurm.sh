#!/usr/bin/env bash
# The paper's runs as a Slurm array: task N trains line N of runs.tsv (after its header), on all GPUs of its nodes.
#   sbatch --array=1-20 --nodes=2 configs/paper/slurm.sh    # table 1, each run on two nodes
# Further arguments are laid over every run's config, such as train.micro_batch_size=8.
#SBATCH --job-name=crosslayer-paper
#SBATCH --array=1-29
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=crosslayer-paper-%a.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR" # the root of the repository

line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" configs/paper/runs.tsv)
[[ -n $line ]] || { echo "configs/paper/runs.tsv has no run $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
IFS=$'\t' read -r run config design learning_rate _ <<< "$line"

# One process a GPU, told its place as torchrun would. torchrun itself would kill the processes 30 seconds after it has
# passed SIGTERM on to them, whether their checkpoint is written by then or not.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
place='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'

trap : TERM # Slurm's signal is for the processes; this script waits for them
status=0
# The first process may end a little later than the others, which wait for nothing once the checkpoint is written.
srun --kill-on-bad-exit=0 --wait=120 bash -c "$place" - \
  crosslayer train "configs/paper/$config.yaml" "model.design=$design" "train.learning_rate=$learning_rate" "$@" \
  --out "runs/paper/$run" || status=$?

# 143: SIGTERM came, out of time or preempted, and the run has written a checkpoint to go on from.
if ((status == 143)); then
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$status"
