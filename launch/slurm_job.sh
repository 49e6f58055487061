#!/usr/bin/env bash
# What slurm.sh gives to sbatch: a process per GPU, which all end when one fails.
exec srun --kill-on-bad-exit=1 "$PYTHON" main.py --distributed "$@"
