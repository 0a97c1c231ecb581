#!/usr/bin/env bash
# Measures training and sampling on one GPU, the most telling first, in some 45 s each on an H100; prints one table,
# row by row. Run from the project's folder:
#
#     benchmarks/gpu.sh [folder for the details] [dataset; without one, CoinRun is generated]
set -uo pipefail
out=${1:-runs/gpu}
data=${2:-$out/data}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/machine.txt"
python -c 'import flax, jax; print("jax", jax.__version__, "flax", flax.__version__)' | tee -a "$out/machine.txt"

row() { # name, and the file whose last line has its figures
    python - "$1" "$2" <<'PY'
import json, sys

name, file = sys.argv[1:]
v = json.loads(open(file).read().splitlines()[-1])
if "steps_per_s" in v:
    v["step_ms"] = 1e3 / v["steps_per_s"]
cell = lambda form, *names: next((form.format(v[n]) for n in names if v.get(n) is not None), "")
cells = [
    cell("{:.2f}", "step_ms", "frame_ms", "space_ms"),
    cell("{:.1%}", "mfu"),
    cell("{:.0f}", "frames_per_s"),
    cell("{:.1f}", "compile_s"),
    cell("{:.0f}", "peak_memory_mib"),
]
notes = [
    cell("time axis {:.2f} ms", "time_ms"),
    cell("error {:.1e}", "space_error"),
    cell("{:.1e}", "time_error"),
    cell("waits for data {:.2%}", "data_wait"),
]
print(f"{name:<26}" + "".join(f"{text:>{n}}" for text, n in zip(cells, (14, 8, 10, 11, 12))), "", *filter(None, notes))
PY
}

measure() { # name, module, flags
    local name=$1
    shift
    if timeout 120 python -m "$@" --json >"$out/$name.txt" 2>"$out/$name.err"; then
        row "$name" "$out/$name.txt"
    else
        echo "$name failed: $(tail -n 1 "$out/$name.err")"
    fi
}

printf '%-26s%14s%8s%10s%11s%12s\n' what "step/frame ms" mfu frames/s "compile s" "memory MiB"
step="benchmarks.train_step --preset coinrun --dtype bfloat16 --model"
for attention in cudnn xla; do # which kernel for 256 tokens in space and 16 in time
    measure "attention-$attention" benchmarks.attention --implementation $attention --dtype bfloat16
done
# With `none` the tokenizer does not fit 80 GB.
measure tokenizer $step tokenizer --remat dots
measure dynamics $step dynamics
measure lam $step lam
measure sample-1 benchmarks.sample --preset coinrun --batch_size 1
measure tokenizer-moving ${step/coinrun/moving} tokenizer --remat dots
measure dynamics-moving ${step/coinrun/moving} dynamics
measure sample-moving-1 benchmarks.sample --preset moving --steps 2 --batch_size 1
measure tokenizer-remat-block $step tokenizer --remat block
measure tokenizer-remat-offload $step tokenizer --remat offload
measure tokenizer-xla $step tokenizer --remat dots --attention xla
measure dynamics-from-tokens $step dynamics --from_tokens
for batch in 16 64; do
    measure "sample-$batch" benchmarks.sample --preset coinrun --batch_size $batch
done
measure checkpoint benchmarks.checkpoint --preset coinrun --dtype bfloat16 --model tokenizer --remat dots

# A real training, for the share of time spent waiting for data.
training="train_tokenizer.py --preset coinrun --dtype bfloat16 --num_steps 150 --log_interval 50 --val_batches 1"
[ -f "$data/metadata.json" ] || timeout 60 python generate_dataset.py --output_dir "$data" --num_episodes 100 >"$out/data.txt" 2>&1
rm -rf "$out/training"
if ! timeout 120 python $training --data_dir "$data" --ckpt_dir "$out/training" >"$out/training.txt" 2>&1; then
    echo "training failed: $(tail -n 1 "$out/training.txt")"
elif grep data_wait "$out/training/metrics.jsonl" >"$out/waits.txt"; then
    row "tokenizer, training" "$out/waits.txt"
fi
