#!/usr/bin/env bash
# From a fresh checkout to a trained network: makes the environment, installs, and trains VGG-11 on
# the embedded synthetic images, on the GPUs that there are or else over two processes on the CPU.
# Run again, it shows the result that is there.
#
#   ./launch/quickstart.sh [--section.field VALUE ...]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment
exec ./launch/multi_gpu.sh quickstart "$@"
