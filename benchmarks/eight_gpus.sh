#!/usr/bin/env bash
# The runs of the headline table on NPROC GPUs of one machine (8 by default), about 8 minutes on 8 x H200.
#   benchmarks/eight_gpus.sh OUTPUT_FOLDER          NPROC=2 benchmarks/eight_gpus.sh … tries it on two
# Each part leaves OUTPUT_FOLDER/PART.done; run it again and it goes on with what is missing. PARTS="qwen3 exchange"
# runs only those; GATES=learned measures that gate alone; SECONDS_LEFT ends it before a part that would not fit. TINY=1:
# tiny models on the CPU, to try it.
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${1:?usage: eight_gpus.sh OUTPUT_FOLDER}"
nproc="${NPROC:-8}"
python="${PYTHON:-python3}"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
mkdir -p "$out"
tiny=() layers=() curve=(--layers 8) save=(--layers 24) sizes=()
if [ -n "${TINY:-}" ]; then
  tiny=(--tiny --device cpu) layers=(--layers 2) curve=(--layers 2 --tiny --seq-len 64) save=(--layers 2 --tiny)
elif [ "$nproc" -lt 4 ]; then
  layers=(--layers "$((8 * nproc))") # the whole model does not fit Transformers' side
fi
[ -n "${TINY:-}" ] && sizes=(--tiny --tokens 64)

# run NAME SECONDS COMMAND…: once, with a limit; what it says goes to OUTPUT_FOLDER/NAME.txt
run() {
  local name="$1" limit="$2"
  shift 2
  if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]]; then return; fi
  if [ -e "$out/$name.done" ]; then return; fi
  if [ -n "${SECONDS_LEFT:-}" ] && [ "$((SECONDS + limit))" -gt "$SECONDS_LEFT" ]; then
    echo "$name: left out, $limit s would not fit" | tee "$out/$name.skipped"
    return
  fi
  local began=$SECONDS
  echo "$name: $*" >"$out/$name.txt"
  if timeout "$limit" "$@" >>"$out/$name.txt" 2>&1; then touch "$out/$name.done"; fi
  echo "$name: $([ -e "$out/$name.done" ] && echo done || echo FAILED), $((SECONDS - began)) s"
}
bench() { run "$1" "$2" "$python" -m slipstream.cli bench --nproc "$nproc" --output "$out/$1" --repeats 1 --steps 6 \
  --warmup 4 "${tiny[@]}" "${@:3}"; }
ranks() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" "$@"; }
save_and_load() {
  local folder="${SCRATCH:-/tmp}/slipstream-eight"
  rm -rf "$folder"
  ranks "$here/load_save.py" --make "$folder" "${save[@]}" &&
    ranks "$here/load_save.py" --side slipstream "$folder" "${save[@]}" &&
    ranks "$here/load_save.py" --side transformers "$folder" "${save[@]}"
  local code=$?
  rm -rf "$folder"
  return $code
}
curves() {
  rm -f "$out"/curve-*.json
  for side in slipstream transformers; do
    ranks "$here/curve.py" "${curve[@]}" --contender $side "$out/curve-$side.json" || return
  done
  "$python" "$here/curve.py" --compare "$out/curve-slipstream.json" "$out/curve-transformers.json"
}
export -f ranks save_and_load curves
export here out nproc python

bench qwen3 280 --model qwen3-30b-a3b "${layers[@]:---layers=0}" --rivals transformers,transformers-ep --gate "${GATES:-balanced,learned}"
bench nemotron 200 --model nemotron-3-nano-30b-a3b "${layers[@]:---layers=0}" --rivals transformers,transformers-ep --gate learned
bench gpt-oss 240 --model gpt-oss-20b "${layers[@]:---layers=0}" --rivals transformers --gate learned
bench qwen3-batch4 120 --model qwen3-30b-a3b "${layers[@]:---layers=0}" --micro-batch 4 --activation-checkpointing full \
  --rivals transformers --gate learned
bench qwen3-half-ep 80 --model qwen3-30b-a3b "${layers[@]:---layers=0}" --ep "$((nproc / 2))" --rivals "" --gate learned
run exchange 80 "$python" -m slipstream.cli bench dispatch --nproc "$nproc" --json "$out/exchange-$(date +%s).json" \
  "${sizes[@]}"
# Arrays do not pass to another shell: these two get theirs as words.
run save-load 120 bash -c "save=(${save[*]}); save_and_load"
run curve 120 bash -c "curve=(${curve[*]}); curves"

"$python" - "$out" <<'TABLE'
import json, sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).glob("*/*.json")):
    for row in json.loads(file.read_text())["rows"]:
        if "error" in row:
            print(f"{file.parent.name:14s} {row['gate']:9s}{row['contender']:17s}{row['error'][:60]}")
            continue
        print(f"{file.parent.name:14s} {row['gate']:9s}{row['contender']:17s}{row['step']['median']:9.1f} ms  "
              f"{row['tokens_per_second']:9,.0f} tokens/s/GPU  {row['peak_gib']:6.1f} GiB  "
              f"step {row.get('speedup_step') or 0:5.2f} x  fwd+bwd {row.get('speedup_forward_backward') or 0:5.2f} x")
TABLE
grep -hE "uniform|load:|save:|apart" "$out"/{exchange,save-load,curve}.txt 2>/dev/null
