# Sourced by run_train.sh and run_tests.sh: one virtual environment, installed into only when needed.

# prepare_environment ROOT EXTRAS: make ROOT/.venv with trimtab[EXTRAS] at the versions of constraints.txt.
# A stamp for the extras holds a hash of everything that decides what is installed.
prepare_environment() {
  local root=$1 extras=$2 python=${PYTHON:-python3} venv=$1/.venv stamp wanted
  if [[ ! -x $venv/bin/python ]]; then
    if ! command -v "$python" >/dev/null; then
      echo "no '$python' found; install Python 3.11 or newer, or set PYTHON to one" >&2
      exit 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$("$python" --version) is too old; trimtab needs 3.11 or newer: set PYTHON to one" >&2
      exit 2
    fi
    echo "making the virtual environment .venv ..."
    "$python" -m venv "$venv" || {
      rm -rf -- "$venv"
      echo "'$python -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2
      exit 2
    }
  fi
  stamp=$venv/.trimtab-${extras//,/-}
  wanted=$(
    cd -- "$root"
    { "$venv/bin/python" --version; echo "$root"; cat pyproject.toml constraints.txt; } | cksum
  )
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  echo "installing trimtab[$extras] into .venv; this takes minutes, and is skipped until something changes ..."
  if ! (
    cd -- "$root"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
      --constraint constraints.txt --editable ".[$extras]"
  ); then
    echo "installation failed; pip's message is above. Nothing was trained or tested" >&2
    exit 1
  fi
  echo "$wanted" >"$stamp"
}
