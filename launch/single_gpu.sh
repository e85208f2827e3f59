#!/usr/bin/env bash
# Debugging: one process, on the GPU if there is one, that points at the operation which made a NaN
# or raised. No tracker but metrics.jsonl. Slow; the numbers are those of any other launch.
#
#   ./launch/single_gpu.sh RECIPE [--run-dir DIR] [--section.field VALUE ...]
#   ./launch/single_gpu.sh RECIPE --train.overfit_batches 2     can the network learn two batches?
#   ./launch/single_gpu.sh RECIPE --profile                     what do five steady steps cost?
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment
if [[ " $* " == *" --profile "* ]]; then
    words=()
    for word in "$@"; do
        if [ "$word" = --profile ]; then words+=(--train.profile_steps 5); else words+=("$word"); fi
    done
    # Without anomaly detection and one kernel at a time, which would be most of what is measured.
    exec "$PYTHON" -X faulthandler -m distvgg train \
        --track.wandb false --track.tensorboard false "${words[@]}"
fi
# Kernels one by one, so that a CUDA error is raised where it happened.
export CUDA_LAUNCH_BLOCKING="${CUDA_LAUNCH_BLOCKING:-1}"
exec "$PYTHON" -X faulthandler -m distvgg train \
    --train.detect_anomaly true --track.wandb false --track.tensorboard false "$@"
