# Sourced by the scripts beside it: where the repository is, which SGLang is meant, where its environment lies.
#   SGLANG=0.5.23 scripts/...   another SGLang than the default, in an environment of its own
#   PYTHON=/path/to/python      the interpreter that a new environment is made from
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DEFAULT_SGLANG=0.5.17
SGLANG=${SGLANG:-$DEFAULT_SGLANG}
if [ "$SGLANG" = "$DEFAULT_SGLANG" ]; then VENV=$ROOT/.venv; else VENV=$ROOT/.venv-$SGLANG; fi
PINS=$ROOT/scripts/pins/sglang-$SGLANG.txt

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
# What an environment is made from; scripts/install leaves a copy in it.
made_from() { cat "$ROOT/pyproject.toml"; [ ! -f "$PINS" ] || cat "$PINS"; }
# run PYTHON NAME ...: the command of that name from scripts/__main__.py, from any working directory. The folder of a script
# stays off sys.path (Python 3.11 and later), or bench, eval, models, ... would be modules there.
run() { PYTHONSAFEPATH=1 exec "$1" "$ROOT/scripts/__main__.py" "${@:2}"; }
