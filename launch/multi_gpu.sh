#!/usr/bin/env bash
# All GPUs of this node; without a GPU, CPU processes.
#
#   ./launch/multi_gpu.sh RECIPE [--run-dir DIR] [--section.field VALUE ...]
#
# NUM_PROCESSES sets how many (default: one a GPU, or 2 on the CPU). It must divide the micro-batches
# of a step, train.global_batch_size / train.micro_batch_size; the result does not depend on it.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment

# A mistake in the command is one line here, before a launcher wraps it in a traceback of its own.
"$PYTHON" -m distvgg config "$@" >/dev/null

gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
NUM_PROCESSES="${NUM_PROCESSES:-$((gpus > 0 ? gpus : 2))}"
if ((gpus < NUM_PROCESSES)); then
    export ACCELERATE_USE_CPU=true
fi
# Cores divided over processes: the launcher's own default is one thread each.
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NUM_PROCESSES ? cores / NUM_PROCESSES : 1))}"

# Port 0: a free one, so that two runs on a node do not clash.
exec "$PYTHON" -m accelerate.commands.launch --config_file accelerate_config.yaml \
    --num_processes "$NUM_PROCESSES" --main_process_port "${MAIN_PROCESS_PORT:-0}" \
    -m distvgg train "$@"
