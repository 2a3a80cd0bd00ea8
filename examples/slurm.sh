#!/usr/bin/env bash
# Encode a corpus with an array of Slurm jobs. Each task reads its own share of the files, and writes a folder of its own.
#
#     mkdir -p logs
#     sbatch --array=1-16%8 examples/slurm.sh corpus vectors --model ./minilm --span passage
#     longnet data inspect vectors --column embedding      # afterwards: all shares are one data set
#
# The corpus is a folder, a glob in quotes or an s3:// address. `vectors` then has the folders 1 to 16. A task that was
# killed goes on where it stopped when Slurm starts it again (`scontrol requeue JOB_TASK`), because of --resume.
#SBATCH --job-name=longnet
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%A_%a.txt
set -euo pipefail
corpus=$1
output=$2
shift 2
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
share=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX
exec longnet encode "$corpus" -o "$output/$SLURM_ARRAY_TASK_ID" --share "$share" --resume --quiet "$@"
