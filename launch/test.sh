#!/usr/bin/env bash
# Makes the environment with what the tests need, and runs them: two files at a time, since they wait
# for processes to start most of the time. With -n 0, one after the other.
#
#   ./launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment dev
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
