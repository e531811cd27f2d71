#!/usr/bin/env bash
# Everything there is to run on a GPU: the tests, a memory check, every benchmark, the report. One command, from anywhere:
#
#     bench/gpu.sh [folder]        # default: bench/results/<device>
#
# Writes <folder>/environment.txt, tests.txt, memcheck.txt (where compute-sanitizer exists), one .json and .txt a
# benchmark, generation.json and parts.json with REPORT.md and its plots, and summary.txt. A part that fails does not stop
# the others; the exit code says whether any did. VARKERN_UPSTREAM=DIR also times the published class from a checkout.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu")')
if [ "$device" = cpu ] && [ "${VARKERN_BENCH_TINY:-0}" != 1 ]; then
    echo "no GPU found; VARKERN_BENCH_TINY=1 rehearses on the CPU" >&2
    exit 2
fi
folder=${1:-bench/results/$device}
mkdir -p "$folder"
failed=0

"$PYTHON" - > "$folder/environment.txt" <<'PY'
import platform
import torch
import triton

print("torch", torch.__version__, "triton", triton.__version__, "python", platform.python_version())
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu")
PY

if [ "${VARKERN_BENCH_TINY:-0}" != 1 ]; then
    "$PYTHON" -m pytest -q -p no:cacheprovider tests 2>&1 | tail -n 40 > "$folder/tests.txt" || failed=1
    if command -v compute-sanitizer > /dev/null; then
        compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops \
            -k "vocabulary or strides or nothing" 2>&1 | tail -n 20 > "$folder/memcheck.txt" || failed=1
    fi
fi

export VARKERN_BENCH_OUT=$folder
for file in bench/test_*.py; do
    name=$(basename "$file" .py)
    name=${name#test_}
    [ "$name" = cpu ] && continue # not a GPU's affair
    [ "$name" = generation ] && options=(${VARKERN_UPSTREAM:+--upstream="$VARKERN_UPSTREAM"}) || options=()
    "$PYTHON" -m pytest "$file" -q -s -p no:cacheprovider --benchmark-json="$folder/$name-rounds.json" "${options[@]}" \
        > "$folder/$name.txt" 2>&1 || failed=1
done
"$PYTHON" -m bench.report "$folder" || failed=1

{
    cat "$folder/environment.txt"
    for part in "$folder"/tests.txt "$folder"/memcheck.txt; do
        [ -e "$part" ] && echo "$(basename "$part" .txt): $(tail -n 1 "$part")"
    done
    for file in bench/test_*.py; do
        name=$(basename "$file" .py)
        [ -e "$folder/${name#test_}.txt" ] || continue
        echo
        cat "$folder/${name#test_}.txt"
    done
} | tee "$folder/summary.txt"
exit $failed
