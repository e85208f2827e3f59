#!/usr/bin/env bash
# The proof: one short run on 1, 2 and 4 processes, and one that is killed and goes on with other numbers of
# processes, end with the same bytes. On a machine with GPUs it takes them; with one GPU, all processes
# share it.
#
#   ./launch/prove.sh [RECIPE] [--processes 1,2,4] [--dir DIR] [--section.field VALUE ...]
#   ./launch/prove.sh --slurm [--nodes 1,2] [--sbatch "SBATCH OPTIONS"] ...      the same by jobs, from the login node
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment
exec "$PYTHON" launch/prove.py "$@"
