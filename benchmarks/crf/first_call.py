"""Time the import of pwlib, the first call of `dense_crf` in a process, and a later one, with and without numba.

    python benchmarks/crf/first_call.py --repeats 3

Each line is a new process. Where numba's cache is empty (delete pwlib/lattice/__pycache__), the first line includes the
compilation.
"""

import argparse
import subprocess
import sys

CODE = """
import sys, time
if "plain" in sys.argv:
    sys.modules["numba"] = None  # as if it were not installed
start = time.perf_counter()
import numpy, torch, pwlib
imported = time.perf_counter()
def call(height, width, labels):
    image = numpy.random.default_rng(0).integers(0, 256, (height // 25, width // 25, 3), dtype=numpy.uint8)
    p = torch.rand(labels, height, width, generator=torch.Generator().manual_seed(0)).softmax(0)
    begin = time.perf_counter()
    pwlib.dense_crf(image.repeat(25, 0).repeat(25, 1), p, filtering="lattice")
    return time.perf_counter() - begin
first, later = call(50, 75, 21), min(call(375, 500, 21) for _ in range(3))
print(f"{sys.argv[1]:8} import {imported - start:.1f} s, first call {first:.2f} s, 375x500 {1000 * later:.0f} ms")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    for _ in range(parser.parse_args().repeats):
        for backend in ("compiled", "plain"):
            subprocess.run([sys.executable, "-W", "ignore", "-c", CODE, backend], check=True)


if __name__ == "__main__":
    main()
