#!/usr/bin/env bash
# All GPUs of this node; without a GPU, CPU processes.
#
#   ./launch/multi_gpu.sh RECIPE [--run-dir DIR] [--section.field VALUE ...]
#
# NUM_PROCESSES sets how many. It must divide the micro-batches of a step, train.global_batch_size /
# train.micro_batch_size; the result does not depend on it. Default: the most that do, of one a GPU,
# or of 2 on the CPU.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment

exec "$PYTHON" -m distvgg launch ${NUM_PROCESSES:+--processes "$NUM_PROCESSES"} \
    --port "${MAIN_PROCESS_PORT:-0}" -- "$@"
