#!/usr/bin/env bash
# Makes the environment with what the tests need, and runs them: a file more at a time than there are
# cores, because tests wait for processes to start. With -n 0, one after the other.
#
#   ./launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment dev
files=$(($(nproc) + 1))
exec "$PYTHON" -m pytest -n "$((files < 8 ? files : 8))" --dist loadfile "$@"
