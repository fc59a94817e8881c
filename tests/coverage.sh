#!/bin/bash
# Build the core with counters in a temporary directory, run the tests on it, and print which lines of it they executed.
#
#   tests/coverage.sh [arguments for pytest]
#   PYTHON=.venv/bin/python tests/coverage.sh         with this Python, which must have the `test` extra installed
#
# The counters are gcov's: threads and code without the GIL count, and the tests take little longer than otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
for item in setup.py pyproject.toml conftest.py README.md LICENSE ioproc tests examples benchmarks docs; do
    [ ! -e $item ] || cp -r $item "$tree"
done
cd "$tree"
rm -rf ioproc/_core*.so build
IOPROC_COVERAGE=1 "$python" setup.py --quiet build_ext --inplace 2>&1
find build -name '*.gcda' -delete           # of the build's own look at the module
failed=0
"$python" -m pytest -p no:cacheprovider "$@" || failed=$?
"$python" tests/core_coverage.py
exit $failed
