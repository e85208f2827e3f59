#!/usr/bin/env bash
# What works on this machine and what to fix: of the machine alone, or of the run that a script beside
# this one would start with the same words. With --prepare it decodes the recipe's data as well, once,
# on a machine with a network: a cluster's login node, with DISTVGG_CACHE a folder that all nodes see.
#
#   ./launch/doctor.sh [RECIPE [--prepare] [--run-dir DIR] [--section.field VALUE ...]]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment
exec "$PYTHON" -m distvgg doctor "$@"
