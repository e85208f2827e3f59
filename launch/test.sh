#!/usr/bin/env bash
# Makes the environment with what the tests need, and runs them.
#
#   ./launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment dev
exec "$PYTHON" -m pytest "$@"
