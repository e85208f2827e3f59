# Sourced by the other scripts: makes the project's own virtual environment once, and uses it.
#
#   use_environment [EXTRA]     afterwards $PYTHON is an interpreter that has distvgg
#
# DISTVGG_VENV is the environment's folder (default .venv in the checkout), PYTHON the interpreter
# that makes it (default: the first of python3.11, python3.12, python3.13, python3 that is 3.11+).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 1

fail() {
    echo "distvgg: error: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with venv: install one (on Debian also python3-venv), or set PYTHON"
}

use_environment() {
    local extra="${1:-}" venv="${DISTVGG_VENV:-$ROOT/.venv}" wanted stamp base
    # The stamp is written last: an install that was cut off is taken up again.
    wanted="$(cksum <setup.cfg) $(cksum <pyproject.toml)"
    stamp="$venv/.distvgg-installed${extra:+-$extra}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        # Nodes that share this checkout may come here at the same time.
        exec 9>"$venv.lock"
        ! command -v flock >/dev/null || flock 9
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x "$venv/bin/python" ]; then
            base="$(find_python)" || exit 2
            echo "Making a virtual environment in $venv"
            "$base" -m venv "$venv"
        fi
        echo "Installing distvgg${extra:+ with [$extra]}; a few minutes the first time"
        "$venv/bin/python" -m pip install --quiet --quiet --editable ".${extra:+[$extra]}"
        echo "$wanted" | tee "$stamp" >"$venv/.distvgg-installed" # an extra comes with all the rest
    fi
    exec 9>&-
    PYTHON="$venv/bin/python"
}
