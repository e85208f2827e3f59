# Sourced by the other scripts: finds or makes an environment that has what distvgg needs.
#
#   use_environment [EXTRA]     afterwards $PYTHON is an interpreter that has it
#
# In this order:
# - the `python` of the shell, if its packages are new enough and DISTVGG_VENV is not set: it is used
#   as it is;
# - DISTVGG_VENV, else .venv in the checkout: made once, with distvgg and what it needs. If the base
#   interpreter has a torch that is new enough, as a site's module may, that torch is used.
#
# PYTHON is the base interpreter (default: the first of python, python3.11, ... that is 3.11+).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 1

fail() {
    echo "distvgg: error: $*" >&2
    exit 2
}

# Whether an interpreter meets the requirements: of all packages, or with --only of some.
meets() { "$1" -m distvgg.requirements "${@:2}" >/dev/null 2>&1; }

find_base() {
    local candidate candidates found=""
    # Every interpreter on PATH: an active virtual environment has the first of each name.
    mapfile -t candidates < <(type -aP python python3.11 python3.12 python3.13 python3)
    [ -z "${PYTHON:-}" ] || candidates=("$(command -v "$PYTHON")")
    for candidate in "${candidates[@]}"; do
        [ -n "$candidate" ] || continue
        # A virtual environment is no base: what it has installed would not be seen.
        "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11) or sys.prefix != sys.base_prefix)' \
            >/dev/null 2>&1 || continue
        if meets "$candidate" --only torch; then
            echo "$candidate"
            return
        fi
        found="${found:-$candidate}"
    done
    [ -n "$found" ] ||
        fail "no Python 3.11 or newer with venv: install one (on Debian also python3-venv), or set PYTHON"
    echo "$found"
}

install() { # VENV EXTRA
    local venv="$1" extra="$2" log="$1/pip.log" constraints="$1/constraints.txt"
    # A torch that the venv sees now is the site's, or was chosen by the user: pip must not replace it.
    "$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        >"$constraints" 2>/dev/null || : >"$constraints"
    meets "$venv/bin/python" --only torch || : >"$constraints"
    "$venv/bin/python" -m pip install --quiet --quiet --constraint "$constraints" \
        --editable ".[${extra:-report}]" 2>"$log" && return
    local last
    last="$(grep -oE -m1 'ERROR: .*' "$log" || tail -n 1 "$log")"
    if grep -q "No space left on device" "$log"; then
        fail "no room for the environment in $venv ($(df -Ph "$venv" | awk 'END { print $4 }') free, expected about" \
            "6G with CUDA): set DISTVGG_VENV to a folder with more room"
    elif grep -qE "No matching distribution|Failed to establish|ConnectionError|Temporary failure" "$log"; then
        fail "pip reaches no package index with what is missing ($last): run this once with a network, or set" \
            "PIP_INDEX_URL; see $log"
    fi
    fail "pip could not install distvgg: $last; see $log"
}

use_environment() {
    local extra="${1:-}" venv="${DISTVGG_VENV:-$ROOT/.venv}" wanted stamp base site=""
    if [ -z "${DISTVGG_VENV:-}" ] && meets python ${extra:+--extra "$extra"}; then
        PYTHON="$(command -v python)"
        [ "$PYTHON" -ef "$venv/bin/python" ] || echo "distvgg: $PYTHON, as it is" >&2
        return
    fi
    # The stamp is written last: an install that was cut off is repeated.
    wanted="$ROOT $(cksum <setup.cfg) $(cksum <pyproject.toml)"
    stamp="$venv/.distvgg-installed${extra:+-$extra}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        # Nodes that share this checkout may come here at the same time.
        mkdir -p "$(dirname "$venv")"
        exec 9>"$venv.lock"
        ! command -v flock >/dev/null || flock 9
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x "$venv/bin/python" ] || [ -e "$venv/.making" ]; then
            base="$(find_base)" || exit 2
            ! meets "$base" --only torch || site="--system-site-packages"
            echo "Making a virtual environment in $venv${site:+ on top of $base, whose torch it uses}"
            mkdir -p "$venv" && : >"$venv/.making" # left by a venv that was cut off
            "$base" -m venv $site "$venv"
            rm "$venv/.making"
        fi
        echo "Installing distvgg with [${extra:-report}]; a few minutes the first time"
        install "$venv" "$extra"
        echo "$wanted" | tee "$stamp" >"$venv/.distvgg-installed" # an extra comes with all the rest
    fi
    exec 9>&-
    PYTHON="$venv/bin/python"
}
