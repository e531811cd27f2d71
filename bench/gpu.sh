#!/usr/bin/env bash
# Runs everything that needs a GPU: all benchmarks, the report, the tests and a memory check. From any folder:
#
#     bench/gpu.sh [folder [stage ...]]        # default: bench/results/<device>, all stages
#
# It writes <folder>/environment.txt, a .txt and a -rounds.json per benchmark, generation.json, blocks.json, parts.json,
# REPORT.md with its plots, tests.txt, memcheck.txt (if compute-sanitizer exists), stages.txt and summary.txt, and
# results.tar.gz with all of these.
#
# The kernels of whole generations are compiled first, on all cores, into Triton's cache, which all stages use. The
# generations come next, starting with d16 and d30 with 24 images and with one image.
#
# Every stage has a share of VARKERN_BENCH_SECONDS (default 530). The time that a stage does not use goes to the stages
# after it. A stage that takes longer is stopped, and the files that it has written are kept. The other stages run even
# if a stage fails or is stopped. stages.txt has the result of each stage, and the kernels whose launch failed; the exit
# code is 0 if no stage failed or was stopped. VARKERN_UPSTREAM=DIR also times the published class from a checkout.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
TINY=${VARKERN_BENCH_TINY:-0}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

# The stages and their shares in hundredths, in the order in which they run. The report reads the files of generation.
STAGES=(compile:8 generation:34 report:3 tests:21 sampling:10 fusion:8 scorer:6 density:6 memcheck:4)
GRACE=5 # seconds between the interrupt and the kill of a stage

folder=${1:-}
[ $# -gt 0 ] && shift
wanted=("$@")
for name in "${wanted[@]}"; do
    if [[ " ${STAGES[*]} " != *" $name:"* ]]; then
        echo "stage must be one of ${STAGES[*]%:*}, got $name" >&2
        exit 2
    fi
done

environment=$("$PYTHON" - <<'PY'
import importlib.metadata
import platform

import torch

try:
    triton = importlib.metadata.version("triton")
except ImportError:
    triton = None
print("torch", torch.__version__, "triton", triton, "python", platform.python_version())
print("cuda", torch.version.cuda, "hip", torch.version.hip)
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
PY
)
device=${environment##*device }
device=${device// /-}
if [ "$device" = cpu ] && [ "$TINY" != 1 ]; then
    echo "no GPU found; use VARKERN_BENCH_TINY=1 to rehearse on the CPU" >&2
    exit 2
fi
folder=${folder:-bench/results/$device}
all_seconds=${VARKERN_BENCH_SECONDS:-530}
mkdir -p "$folder"
export VARKERN_BENCH_OUT=$folder
failed=0

is_wanted() {
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]]
}

share_of() { # of one wanted stage, in seconds
    local entry total=0 own=0
    for entry in "${STAGES[@]}"; do
        is_wanted "${entry%:*}" && total=$((total + ${entry#*:}))
        [ "${entry%:*}" = "$1" ] && own=${entry#*:}
    done
    echo $((all_seconds * own / total))
}

shares_after() { # of all wanted stages after this one
    local entry sum=0 after=0
    for entry in "${STAGES[@]}"; do
        [ $after = 1 ] && is_wanted "${entry%:*}" && sum=$((sum + $(share_of "${entry%:*}")))
        [ "${entry%:*}" = "$1" ] && after=1
    done
    echo $sum
}

stage() { # name, then the command; its output goes to <folder>/<name>.txt
    local name=$1 began=$SECONDS share limit code state=done
    shift
    share=$(share_of "$name")
    limit=$((all_seconds - SECONDS - $(shares_after "$name") - GRACE))
    timeout --signal=INT --kill-after=$GRACE $((limit > 1 ? limit : 1)) "$@" > "$folder/$name.txt" 2>&1
    code=$?
    if [ $code = 124 ] || [ $code = 137 ]; then
        state=stopped
    elif [ $code != 0 ]; then
        state=failed
    fi
    [ "$state" = done ] || failed=1
    local kernels
    kernels=$(grep -oE 'failed kernel: \w+' "$folder/$name.txt" | sort -u | cut -d' ' -f3 | paste -sd, -)
    printf '%-11s %4d s of %4d  %s\n' "$name" $((SECONDS - began)) "$share" "$state${kernels:+, kernels: $kernels}" |
        tee -a "$folder/stages.txt" >&2
}

run_stage() {
    case $1 in
        tests)
            # The tests that depend most on the device come first. All workers share the device.
            local order=(tests/test_graphs.py tests/test_waiting.py tests/test_chunks.py tests/ops tests/test_generation.py tests)
            local workers=()
            "$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 8)
            [ "$TINY" = 1 ] && order=(tests/bench/test_compare.py) workers=()
            stage tests "$PYTHON" -m pytest -q -p no:cacheprovider -p bench.blame "${workers[@]}" "${order[@]}"
            ;;
        compile)
            stage compile "$PYTHON" -m bench.compile_kernels
            ;;
        memcheck)
            command -v compute-sanitizer > /dev/null || return 0
            stage memcheck compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest -q \
                -p no:cacheprovider tests/ops -k "vocabulary or strides or nothing"
            ;;
        report)
            stage report "$PYTHON" -m bench.report "$folder"
            ;;
        *)
            local options=()
            [ "$1" = generation ] && [ -n "${VARKERN_UPSTREAM:-}" ] && options=(--upstream="$VARKERN_UPSTREAM")
            stage "$1" "$PYTHON" -m pytest "bench/test_$1.py" -q -s -p no:cacheprovider -p bench.blame \
                --benchmark-json="$folder/$1-rounds.json" "${options[@]}"
            ;;
    esac
}

echo "$environment" > "$folder/environment.txt"
: > "$folder/stages.txt"
for entry in "${STAGES[@]}"; do
    is_wanted "${entry%:*}" && run_stage "${entry%:*}"
done
printf '%-11s %4d s of %4d\n' all $SECONDS "$all_seconds" >> "$folder/stages.txt"

{
    cat "$folder/environment.txt" "$folder/stages.txt"
    for entry in "${STAGES[@]}"; do
        name=${entry%:*}
        [ -s "$folder/$name.txt" ] || continue
        echo
        echo "== $name"
        if [ "$name" = tests ] || [ "$name" = memcheck ]; then tail -n 25 "$folder/$name.txt"; else cat "$folder/$name.txt"; fi
    done
} | tee "$folder/summary.txt"
rm -f "$folder/results.tar.gz"
tar -czf "/tmp/varkern-results-$$.tar.gz" -C "$folder" . && mv "/tmp/varkern-results-$$.tar.gz" "$folder/results.tar.gz"
exit $failed
