#!/usr/bin/env bash
# Measures training and sampling on one GPU, the most telling first, in some 45 s each on an H100; prints one table.
# Run from the project's folder:
#
#     benchmarks/gpu.sh [folder for the details] [dataset; without one, CoinRun is generated]
set -uo pipefail
out=${1:-runs/gpu}
data=${2:-$out/data}
mkdir -p "$out"
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
fi

python - "$out" <<'PY'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}
log = out / "training" / "metrics.jsonl"
for line in log.read_text().splitlines() if log.exists() else []:
    if "data_wait" in (v := json.loads(line)):
        rows["tokenizer, training"] = v | {"step_ms": 1e3 / v["steps_per_s"]}
print(f"{'what':<26}{'step/frame ms':>14}{'mfu':>8}{'frames/s':>10}{'compile s':>11}{'memory MiB':>12}")
for name, v in rows.items():
    cell = lambda form, *names: next((form.format(v[n]) for n in names if v.get(n) is not None), "")
    notes = [cell("time axis {:.2f} ms", "time_ms"), cell("error {:.1e}", "space_error"), cell("{:.1e}", "time_error")]
    print(
        f"{name:<26}{cell('{:.2f}', 'step_ms', 'frame_ms', 'space_ms'):>14}{cell('{:.1%}', 'mfu'):>8}"
        f"{cell('{:.0f}', 'frames_per_s'):>10}{cell('{:.1f}', 'compile_s'):>11}{cell('{:.0f}', 'peak_memory_mib'):>12}  ",
        *notes,
        cell("waits for data {:.2%}", "data_wait"),
    )
PY
