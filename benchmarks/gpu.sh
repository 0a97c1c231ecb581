#!/usr/bin/env bash
# Measures training and sampling on one GPU, in under eight minutes; prints one table. Run from the project's folder:
#
#     benchmarks/gpu.sh [folder for the details]
set -uo pipefail
out=${1:-runs/gpu}
mkdir -p "$out"
export JAX_COMPILATION_CACHE_DIR=$out/cache
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/machine.txt"
python -c 'import flax, jax; print("jax", jax.__version__, "flax", flax.__version__)' | tee -a "$out/machine.txt"

measure() { # name, module, flags
    local name=$1
    shift
    if timeout 120 python -m "$@" --json >"$out/$name.txt" 2>"$out/$name.err"; then
        tail -n 1 "$out/$name.txt" >"$out/$name.json"
    else
        echo "$name failed: $(tail -n 1 "$out/$name.err")"
    fi
}

step="benchmarks.train_step --preset coinrun --dtype bfloat16 --model"
for attention in cudnn xla; do # which kernel for 256 tokens in space and 16 in time
    measure "attention-$attention" benchmarks.attention --implementation $attention --dtype bfloat16
done
measure tokenizer $step tokenizer
measure tokenizer-xla $step tokenizer --attention xla
measure tokenizer-remat-block $step tokenizer --remat block
measure tokenizer-remat-offload $step tokenizer --remat offload
measure lam $step lam
measure dynamics $step dynamics
measure dynamics-from-tokens $step dynamics --from_tokens
for batch in 1 16 64; do
    measure "sample-$batch" benchmarks.sample --preset coinrun --batch_size $batch
done
measure checkpoint benchmarks.checkpoint --preset coinrun --dtype bfloat16 --model tokenizer

python - "$out" <<'PY'
import json, sys
from pathlib import Path

print(f"{'what':<26}{'step/frame ms':>14}{'mfu':>8}{'frames/s':>10}{'compile s':>11}{'memory MiB':>12}")
for file in sorted(Path(sys.argv[1]).glob("*.json")):
    v = json.loads(file.read_text())
    cell = lambda form, *names: next((form.format(v[n]) for n in names if v.get(n) is not None), "")
    print(
        f"{file.stem:<26}{cell('{:.2f}', 'step_ms', 'frame_ms', 'space_ms'):>14}{cell('{:.1%}', 'mfu'):>8}"
        f"{cell('{:.0f}', 'frames_per_s'):>10}{cell('{:.1f}', 'compile_s'):>11}{cell('{:.0f}', 'peak_memory_mib'):>12}"
        + (f"   time axis {v['time_ms']:.2f} ms, errors {v['space_error']:.1e} {v['time_error']:.1e}" if "time_ms" in v else "")
    )
PY
