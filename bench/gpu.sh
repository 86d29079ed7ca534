#!/usr/bin/env bash
# Everything that needs a GPU, in parts of a few minutes each, for a machine that is lent for a short time:
#
#     bench/gpu.sh                          all parts that are not done yet, then the report
#     bench/gpu.sh build decode             these parts, done or not (a name stands for all parts that begin with it)
#     bench/gpu.sh --peers DIR              packages to compare with, installed into DIR (bench/README.md)
#     bench/gpu.sh --seconds N              begin no part that N seconds have no room for; the next call goes on
#     bench/gpu.sh --dry-run                the same Python at sizes that answer nothing, on any machine, without a GPU
#     bench/gpu.sh --list                   the names of the parts
#
# A part that ended well leaves a mark under build/gpu/, so that the next call goes on behind it; a part that failed or
# took longer than its limit is reported and the others still run. Where $OUT names a folder, results, logs and marks go
# there too, after every part, as gpu-parts.tar.gz: unpacked over a checkout (tar -xzf), the next call goes on from it.
# Needs nvcc and a Python with a CUDA torch >= 2.11 (PYTHON=...), no network. LIMIT=SECONDS replaces every part's limit.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
STATE=${GPU_STATE:-build/gpu}
DRY=
PEERS=
BUDGET=
LEAST_SECONDS=60 # that a part is begun with
PARTS=(
    expect build test sanitize micro
    decode-1x128k decode-1x1m decode-1x32k decode-8x128k decode-32x32k decode-1x512k decode-1x8k
    ops-1x1m ops-1x128k
    prefill-1x128k prefill-1x512k prefill-1x1m
    blocks-1x32k blocks-1x128k blocks-sm90a-test blocks-sm90a-1x32k blocks-sm90a-1x128k
    model-1x128k model-4x128k model-1x512k
)

# --- what parts are made of

# Seconds, then a command.
limited() {
    local seconds=${LIMIT:-$1}
    shift
    if [ -n "$BUDGET" ] && [ "$seconds" -gt $((BUDGET - SECONDS)) ]; then
        seconds=$((BUDGET - SECONDS > 1 ? BUDGET - SECONDS : 1))
    fi
    timeout --kill-after=10 "$seconds" "$@"
    local status=$?
    case $status in 124 | 137) echo "stopped after $seconds s" ;; esac
    return $status
}

python() { PYTHONPATH="${PEERS:+$PEERS:}." limited "$1" "$PYTHON" "${@:2}"; }

# "8x128k" -> --batch 8 --tokens 128k
sizes() {
    if [ -n "$DRY" ]; then
        echo --batch $((${1%x*} > 1 ? 2 : 1)) --tokens 4k --q-heads 4 --kv-heads 2 --head-dim 32 --dtype float32 --topk 64 --rounds 1
    else
        echo --device cuda --batch "${1%x*}" --tokens "${1#*x}"
    fi
}

bench() { # kind, sizes, more options
    local words
    read -ra words <<<"$(sizes "$2")"
    [ -z "$DRY" ] || words+=(--as-on-gpu --layers 2)
    python 280 -m kvselect bench "$1" "${words[@]}" "${@:3}" --out "$STATE/$1-$2"
}

# --- parts: part_NAME, or kind_NAME for those with sizes

part_expect() { # what the step model says, before anybody measures
    python 60 bench/gpu_report.py --expect
}

part_build() { # this machine's architecture only
    [ -z "$DRY" ] || { echo "dry run: nothing is built"; return 0; }
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return 1
    [ "$arch" = 90 ] && arch=90a
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
    rm -f build/.built-host
    CUDAARCHS="$arch-real" limited 540 make VENV= PYTHON="$PYTHON" KVSELECT_CUDA=on build/.built-host &&
        python 60 -m kvselect doctor
}

part_test() { # every op's tests on the GPU, against the same references as on the CPU
    [ -z "$DRY" ] || { echo "dry run: no tests for a GPU"; return 0; }
    # What has never run on a GPU comes in a part of its own (blocks-sm90a-test): its faults end a process.
    python 400 -m pytest -q -m cuda -p no:cacheprovider tests --ignore tests/test_block_sparse_attention_sm90a.py
}

# Small shapes: the tools run kernels a hundred times slower.
part_sanitize() {
    [ -z "$DRY" ] || { echo "dry run: nothing to sanitize"; return 0; }
    local tool status=0
    for tool in memcheck racecheck; do
        PYTHONPATH=. limited 280 compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 0 "$PYTHON" -m pytest \
            -q -m cuda -p no:cacheprovider tests/test_merge_splits.py tests/test_on_device.py tests/test_addressing.py || status=1
        PYTHONPATH=. limited 280 compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 0 "$PYTHON" -m pytest \
            -q -m cuda -p no:cacheprovider tests/test_block_sparse_attention.py tests/test_block_mass.py -k ragged || status=1
    done
    return $status
}

part_micro() { # the pieces of the step model, without torch
    local arch=90a
    mkdir -p "$STATE/micro"
    if [ -z "$DRY" ]; then
        arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return 1
        [ "$arch" = 90 ] && arch=90a
    elif ! command -v nvcc >/dev/null; then
        echo "dry run: no nvcc here, nothing is compiled"
        return 0
    fi
    limited 120 nvcc -O3 -std=c++17 -gencode "arch=compute_$arch,code=sm_$arch" bench/gpu/micro.cu -o "$STATE/micro/micro" &&
        limited 120 "$STATE/micro/micro" ${DRY:+--expect} >"$STATE/micro/micro.partial" &&
        mv "$STATE/micro/micro.partial" "$STATE/micro/micro.json"
}

kind_decode() { bench decode "$1"; }

kind_ops() { bench ops "$1"; }

kind_prefill() { bench prefill "$1" --chunk-tokens "$([ -n "$DRY" ] && echo 128 || echo 512)"; }

kind_blocks() { # attention over kept blocks, and the search for their masses
    local words=(--quick) of=$1
    # The kernel in Hopper's own instructions, by its name.
    if [ "${1%%-*}" = sm90a ]; then
        on_sm90 || { echo "no GPU of architecture 9.0: nothing to run"; return 0; }
        of=${1#*-}
        [ "$of" != test ] || { test_sm90a; return; }
    fi
    [ -n "$DRY" ] || words=(--device cuda --tokens "${of#*x}" --queries 8192 --block-sizes 128,64 --rounds 20)
    [ "$of" = "$1" ] || words+=(--implementation sm90a)
    python 280 bench/block_sparse.py "${words[@]}" --out "$STATE/blocks-$1/blocks.json"
}

on_sm90() { [ -z "$DRY" ] && nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | grep -qx 9.0; }

test_sm90a() { # from one product to many items, then memcheck on the smallest
    local file=tests/test_block_sparse_attention_sm90a.py
    python 200 -m pytest -q -x -m cuda -p no:cacheprovider "$file" &&
        PYTHONPATH=. limited 200 compute-sanitizer --tool memcheck --error-exitcode 1 --launch-timeout 0 "$PYTHON" \
            -m pytest -q -x -m cuda -p no:cacheprovider "$file" -k "own_token or ragged"
}

kind_model() {
    local words
    if [ -n "$DRY" ]; then
        words=(--quick)
    else
        read -ra words <<<"$(sizes "$1")"
    fi
    python 400 bench/model_step.py "${words[@]}" --out "$STATE/model-$1/model.json"
}

# --- running them

run_part() {
    if declare -F "part_$1" >/dev/null; then "part_$1"; else "kind_${1%%-*}" "${1#*-}"; fi
}

report() {
    python 60 bench/gpu_report.py --parts "$STATE" ${DRY:+--out "$STATE/report.json"}
}

keep() { # results, logs and marks, where they outlive a lent machine
    [ -n "${OUT:-}" ] || return 0
    mkdir -p "$OUT" &&
        tar --exclude=micro/micro -czf "$OUT/gpu-parts.tar.partial" "$STATE" && # never half a file
        mv "$OUT/gpu-parts.tar.partial" "$OUT/gpu-parts.tar.gz"
}

wanted=()
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) DRY=1 STATE=${GPU_STATE:-build/gpu-dry-run} ;;
    --seconds)
        [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "--seconds: got '${2:-}', allowed: a whole number >= 1" >&2; exit 2; }
        BUDGET=$2
        shift
        ;;
    --list)
        printf '%s\n' "${PARTS[@]}" report
        exit 0
        ;;
    --peers)
        [ -d "${2:-}" ] || { echo "--peers: got '${2:-}', allowed: a folder with installed packages" >&2; exit 2; }
        PEERS=$(cd "$2" && pwd)
        shift
        ;;
    report) wanted+=(report) ;;
    *)
        found=
        for part in "${PARTS[@]}"; do
            if [ "$part" = "$1" ] || [ "${part%%-*}" = "$1" ]; then wanted+=("$part") found=1; fi
        done
        [ -n "$found" ] || { echo "part: got '$1', allowed: ${PARTS[*]} report, or what several begin with" >&2; exit 2; }
        ;;
    esac
    shift
done
mkdir -p "$STATE"
if [ ${#wanted[@]} -eq 0 ]; then
    for part in "${PARTS[@]}"; do [ -e "$STATE/$part.done" ] || wanted+=("$part"); done
fi

failed=()
for part in ${wanted[@]+"${wanted[@]}"}; do
    [ "$part" != report ] || continue # last, anyway
    if [ -n "$BUDGET" ] && [ $((BUDGET - SECONDS)) -lt "$LEAST_SECONDS" ]; then
        echo "=== $part and what follows: no time left, call again"
        break
    fi
    echo "=== $part"
    begin=$SECONDS
    rm -f "$STATE/$part.done"
    if run_part "$part" 2>&1 | tee "$STATE/$part.log"; then
        touch "$STATE/$part.done"
    else
        failed+=("$part")
    fi
    echo "=== $part: $((SECONDS - begin)) s"
    keep || failed+=("keep")
done
echo "=== report"
report || failed+=(report)
keep || failed+=("keep")
if [ -n "${OUT:-}" ]; then # beside the archive, to be read at once
    for file in "$STATE"/report.json "$STATE"/report.md; do [ ! -e "$file" ] || cp "$file" "$OUT"; done
fi
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (logs in $STATE)"; exit 1; }
