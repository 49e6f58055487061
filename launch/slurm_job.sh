#!/usr/bin/env bash
# The job that slurm.sh submits: one process per GPU; all end when one fails. srun does not take over sbatch's CPUs.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$PYTHON" main.py --distributed "$@"
