#!/usr/bin/env bash
# From a fresh checkout to a trained network: makes the environment, installs, and trains VGG-11 on
# the embedded synthetic images over two processes. Run again, it shows the result that is there.
#
#   ./launch/quickstart.sh [--section.field VALUE ...]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment
NUM_PROCESSES=2 exec ./launch/multi_gpu.sh quickstart "$@"
