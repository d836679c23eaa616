#!/usr/bin/env bash
# Create .venv and install Slipstream for development, with the versions that were tested (constraints.txt).
#
# torch is chosen first, since the wrong build costs gigabytes:
#   a supported torch that the interpreter already has   left alone (the venv then sees the system's packages)
#   an NVIDIA GPU, or macOS                              torch as the package index has it
#   anything else                                        the CPU build, never CUDA
# Instant when nothing changed since the last time. PYTHON=python3.12 chooses another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=.venv
tested_torch=2.13.0
tested_triton=3.7.0 # what torch 2.13 ships with on GPUs; on CPU it runs our kernels interpreted
cpu_wheels=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

stamp=$venv/.bootstrapped
inputs=$(cat pyproject.toml constraints.txt scripts/bootstrap.sh | cksum)
if [ -x $venv/bin/slipstream ] && [ "$(cat $stamp 2>/dev/null)" = "$inputs" ]; then
    exit 0
fi

fail() {
    echo "bootstrap: $1" >&2
    exit 1
}
pip() { $venv/bin/python -m pip "$@"; }
# Whether the installed torch meets pyproject.toml. pip itself compares; without an index it can only say yes or no.
torch_requirement=$(sed -n 's/^ *"\(torch[<>=].*\)",$/\1/p' pyproject.toml)
torch_is_supported() {
    env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null \
        "$1" -m pip install --quiet --no-index --no-deps --dry-run "$torch_requirement" >/dev/null 2>&1
}

command -v "$python" >/dev/null || fail "no $python; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON"

if [ ! -x $venv/bin/python ]; then
    options=()
    # Not when python is itself that of an environment: its packages are not the system's.
    if torch_is_supported "$python" && "$python" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
        options=(--system-site-packages)
    fi
    "$python" -m venv ${options[@]+"${options[@]}"} $venv ||
        fail "could not create $venv; on Debian and Ubuntu install python3-venv"
fi

if torch_is_supported $venv/bin/python; then
    echo "bootstrap: using the torch that is there already"
elif nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "bootstrap: an NVIDIA GPU is present; installing $torch_requirement"
    pip install "$torch_requirement"
elif [ "$(uname -s)" = Darwin ]; then
    pip install "$torch_requirement"
else
    echo "bootstrap: no GPU; installing the CPU build of torch $tested_torch"
    # Only CPU builds carry +cpu, so neither line can pull CUDA. The first serves machines with a wheel folder of their own.
    pip install --quiet "torch==$tested_torch+cpu" 2>/dev/null ||
        pip install --extra-index-url $cpu_wheels "torch==$tested_torch+cpu"
fi

if [ "$(uname -s)" = Linux ] && ! $venv/bin/python -c 'import triton' 2>/dev/null; then
    pip install --quiet --no-deps triton==$tested_triton || echo "bootstrap: no triton for this machine; kernel tests will skip"
fi
echo "bootstrap: installing slipstream and what its tests need"
pip install --quiet -c constraints.txt -e '.[test,docs]'
echo "$inputs" >$stamp
