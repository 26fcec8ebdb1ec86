#!/usr/bin/env bash
# The measurements, on a machine with one GPU and no network, from the repository's root:
#
#   benchmarks/gpu/run.sh A RESULTS       CUDA tests, CRF benchmark, notebooks, fast tests: at most 5 minutes
#   benchmarks/gpu/run.sh B RESULTS       CamVid in three stages, contextual CRF:           at most 6 minutes
#
# Every step has a time limit and writes its JSON file in RESULTS as it goes. A step that fails or is stopped does not keep
# the next one from running. The exit status is that of no step: read RESULTS/run.json. RESULTS holds at most eight files.
#
# PYTHON     the interpreter that has PyTorch                                            (python3)
# SET        what prepare.sh collected                                                   (build/gpu/A, build/gpu/B)
# TINY=1     tiny sizes, to try the script anywhere; TESTS, CUDA_TESTS and NOTEBOOKS name other files, or none
set -u
cd "$(dirname "$0")/../.." || exit 1
run=${1:?A or B}
out=$(mkdir -p "${2:?folder for the results}" && cd "$2" && pwd)
PYTHON=${PYTHON:-python3} SET=${SET:-build/gpu/$run} TINY=${TINY:-}
TESTS=${TESTS-tests} NOTEBOOKS=${NOTEBOOKS-$(echo notebooks/[0-9]*.ipynb)} CUDA_TESTS=${CUDA_TESTS-tests/test_cuda.py}
export PYTHONPATH=$PWD:$PWD/benchmarks/gpu PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive MPLBACKEND=agg
export PWLIB_PROFILE=quick
cores=$(nproc) steps="" begin=$SECONDS
workers=$((cores > 2 ? cores - 2 : 1))

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, output into log.txt, and note how it ended in run.json.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*" >> "$out/log.txt"
    timeout --kill-after=5 "$limit" "$@" >> "$out/log.txt" 2>&1
    status=$?
    [ $status -eq 124 ] || [ $status -eq 137 ] && echo "(stopped at its time limit)" >> "$out/log.txt"
    steps="$steps${steps:+, }{\"name\": \"$name\", \"limit\": $limit, \"seconds\": $((SECONDS - start)), \"status\": $status}"
    printf '{"run": "%s", "total_seconds": %s, "steps": [%s]}\n' "$run" "$((SECONDS - begin))" "$steps" > "$out/run.json"
    echo "$name: exit status $status, $((SECONDS - start)) s"
}

set_up() {
    if compgen -G "$SET/wheels/*.whl" > /dev/null; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target build/gpu/site "$SET"/wheels/*.whl
    fi
    command -v nvidia-smi > /dev/null && nvidia-smi
    [ "$run" = A ] || return 0
    # One inference on the CPU compiles what is cached for all later processes.
    "$PYTHON" - << 'END'
import os, platform, sys, numpy, torch, pwlib
image, p = numpy.zeros((64, 96, 3), numpy.uint8), torch.full((3, 64, 96), 1 / 3)
pwlib.dense_crf(image, p, filtering="lattice")
print(sys.version, torch.__version__, torch.cuda.is_available(), os.cpu_count(), "cores,", platform.processor())
END
}
export -f set_up
export PYTHON SET run
PYTHONPATH=$PYTHONPATH:$PWD/build/gpu/site

pytest="$PYTHON -m pytest -p recorder -q -p no:cacheprovider"

# Side by side: the notebooks take as long as the longest one, on a core each, and leave the others to the tests.
notebooks_and_tests() {
    if [ -n "$TESTS" ]; then
        $pytest -n $((workers > 9 ? workers - 8 : 1)) --dist loadscope --record "$out/tests.json" --ignore=tests/browser \
            --ignore=tests/classroom -m "not slow and not browser and not classroom" $TESTS &
    fi
    if [ -n "$NOTEBOOKS" ]; then
        $pytest -n $((workers < 9 ? workers : 9)) --dist loadscope --record "$out/notebooks.json" --nbval-lax \
            --nbval-current-env --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout=120 $NOTEBOOKS
    fi
    wait
}
export -f notebooks_and_tests
export TESTS NOTEBOOKS workers out pytest

: > "$out/log.txt"
case $run in
A)
    step set-up 30 bash -c set_up
    [ -n "$CUDA_TESTS" ] && step cuda 50 $pytest -n $((workers < 4 ? workers : 4)) --record "$out/cuda.json" $CUDA_TESTS
    step crf 85 "$PYTHON" benchmarks/gpu/crf.py "$out/crf.json" --seconds $((TINY ? 60 : 80)) ${TINY:+--tiny}
    export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
    step notebooks-and-tests 135 bash -c notebooks_and_tests
    ;;
B)
    step set-up 20 bash -c set_up
    step camvid 335 "$PYTHON" benchmarks/gpu/camvid.py "$out" --root "$SET" --weights "$SET/vgg16.pt" \
        --seconds $((TINY ? 200 : 315)) ${TINY:+--tiny}
    ;;
*)
    echo "the run is ${run@Q}; expected A or B" >&2
    exit 2
    ;;
esac
exit 0
