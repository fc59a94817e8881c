#!/bin/bash
# Build the core with sanitizers in a temporary directory and run the tests on it.
#
#   tests/sanitize.sh [arguments for pytest]          AddressSanitizer and UndefinedBehaviorSanitizer
#   IOPROC_SANITIZE=thread tests/sanitize.sh tests/test_threads.py          ThreadSanitizer
#   PYTHON=.venv/bin/python tests/sanitize.sh         with this Python, which must have the `test` extra installed
#
# The interpreter is not instrumented: the runtime is preloaded, leaks are not looked for (tests/test_leaks.py does
# that), and pymalloc is off so that every object is seen.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
export IOPROC_SANITIZE=${IOPROC_SANITIZE:-1}

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
for item in setup.py pyproject.toml conftest.py README.md LICENSE ioproc tests examples benchmarks docs; do
    [ ! -e $item ] || cp -r $item "$tree"
done
cd "$tree"
rm -rf ioproc/_core*.so build
"$python" setup.py --quiet build_ext --inplace 2>&1

library() { "${CC:-cc}" -print-file-name="$1"; }
run="$python -m pytest -p no:cacheprovider --capture=sys"     # reports go to file descriptor 2
export PYTHONMALLOC=malloc
if [ "$IOPROC_SANITIZE" = thread ]; then
    echo "race:_dl_deallocate_tls" >suppressions       # the C library's own
    export TSAN_OPTIONS=exitcode=66:suppressions=$tree/suppressions
    run="setarch -R $run"       # ThreadSanitizer does not know where newer kernels may put things
    preload=$(library libtsan.so)
else
    export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1:abort_on_error=1
    export UBSAN_OPTIONS=print_stacktrace=1
    preload="$(library libasan.so) $(library libubsan.so)"
fi
LD_PRELOAD=$preload $run "$@"
