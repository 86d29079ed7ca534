#!/usr/bin/env bash
# Everything that needs a GPU, in parts of a few minutes each, for a machine that is lent for a short time:
#
#     bench/gpu.sh              all parts that are not done yet
#     bench/gpu.sh build test   these parts, done or not
#
# A part that ended well leaves a mark under build/gpu/, so that the next call goes on behind it; a part that failed is
# reported and the others still run. Needs nvcc and a Python with a CUDA torch >= 2.11 (PYTHON=...), no network.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
STATE=build/gpu
mkdir -p "$STATE"
PARTS=(build test sanitize)

part_build() { # this machine's architecture only
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return 1
    [ "$arch" = 90 ] && arch=90a
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
    rm -f build/.built-host
    CUDAARCHS="$arch-real" make VENV= PYTHON="$PYTHON" KVSELECT_CUDA=on build/.built-host &&
        PYTHONPATH=. "$PYTHON" -m kvselect doctor
}

part_test() { # every op's tests on the GPU, against the same references as on the CPU
    PYTHONPATH=. "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider tests
}

# Small shapes: the tools run kernels a hundred times slower.
part_sanitize() {
    local tool status=0
    for tool in memcheck racecheck; do
        PYTHONPATH=. compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 0 "$PYTHON" -m pytest -q -m cuda \
            -p no:cacheprovider tests/test_merge_splits.py tests/test_on_device.py tests/test_addressing.py || status=1
    done
    return $status
}

failed=()
if [ $# -eq 0 ]; then
    for part in "${PARTS[@]}"; do [ -e "$STATE/$part.done" ] || set -- "$@" "$part"; done
fi
for part in "$@"; do
    declare -F "part_$part" >/dev/null || { echo "part: got $part, allowed: ${PARTS[*]}"; exit 2; }
    echo "=== $part"
    begin=$SECONDS
    rm -f "$STATE/$part.done"
    if "part_$part" 2>&1 | tee "$STATE/$part.log"; then
        touch "$STATE/$part.done"
    else
        failed+=("$part")
    fi
    echo "=== $part: $((SECONDS - begin)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (logs in $STATE)"; exit 1; }
