#!/usr/bin/env bash
# The job that slurm.sh submits: one process per GPU; all end when one fails.
exec srun --kill-on-bad-exit=1 "$PYTHON" main.py --distributed "$@"
