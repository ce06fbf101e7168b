#!/usr/bin/env bash
# Everything that needs a GPU, in one run: build, tests, compute-sanitizer, and the tables of docs/performance.md.
#
#   tools/gpu_check.sh                        all steps
#   tools/gpu_check.sh --only tests,bench     some of: core facts tests sanitizer bench
#   tools/gpu_check.sh --tests 'tests/gpu/test_nvlink.py -k every_byte' --bench 'large small' --rounds 3
#   tools/gpu_check.sh --sanitize 'tests/gpu/test_kernels.py -k range'   what compute-sanitizer watches
#   tools/gpu_check.sh --out DIRECTORY        where the logs and rows go (default: a new one under /tmp)
#   tools/gpu_check.sh --python PYTHON        the interpreter (default: .venv/bin/python, else python3)
#   tools/gpu_check.sh --limit 'tests=90 file=30'    seconds for a step, and for each file of tests
#   tools/gpu_check.sh --budget 720           seconds for all of it; steps that do not begin in time have failed
#
# Each step has a time limit. What has not been run on a GPU before goes first (docs/performance.md says what that is).
# Nothing is downloaded. The exit code is 1 if a step failed, or was not begun in time, and the last lines say which.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

steps="core facts tests bench sanitizer" tests="tests/gpu" sanitized="" words="" rounds=5 out="" python="" budget=""
limits="facts=60 core=300 tests=1500 file=300 sanitizer=400 bench=900"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --only | --tests | --sanitize | --bench | --rounds | --out | --python | --limit | --budget)
      [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
      case $1 in
        --only) steps=${2//,/ } ;;
        --tests) tests=$2 ;;
        --sanitize) sanitized=$2 ;;
        --bench) words=$2 ;;
        --rounds) rounds=$2 ;;
        --out) out=$2 ;;
        --python) python=$2 ;;
        --budget) budget=$2 ;;
        --limit) limits="$limits $2" ;; # as tests=60; the last one counts
      esac
      shift 2 ;;
    *) echo "there is no option $1" >&2; usage >&2; exit 2 ;;
  esac
done
for step in $steps; do
  case " core facts tests sanitizer bench " in *" $step "*) ;; *) echo "there is no step $step" >&2; exit 2 ;; esac
done
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=$PWD/.venv/bin/python || python=$(command -v python3); }
[ -n "$out" ] || out=$(mktemp -d /tmp/gpu_check.XXXXXX)
mkdir -p "$out" || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

limit_of() { local found=60 one; for one in $limits; do [ "${one%%=*}" = "$1" ] && found=${one#*=}; done; echo "$found"; }

failed=()
run_step() { # NAME COMMAND...
  local name=$1 began=$SECONDS code limit; shift
  limit=$(limit_of "$name")
  if [ -n "$budget" ]; then
    [ $((budget - SECONDS)) -ge "$limit" ] || limit=$((budget - SECONDS))
    [ "$limit" -gt 0 ] || { echo "== $name: FAILED, no time is left"; failed+=("$name (not begun)"); return; }
  fi
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) echo "== $name: fine, $((SECONDS - began)) s" ;;
    124 | 137) echo "== $name: FAILED, it ran past its limit"; failed+=("$name (time limit)") ;;
    *) echo "== $name: FAILED with exit code $code, $((SECONDS - began)) s"; failed+=("$name") ;;
  esac
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader || return 1
  uname -sr
  "$python" - <<'PY'
import importlib, sys
print("Python", sys.version.split()[0])
for name in ("numpy", "cupy", "torch", "triton", "ucxx", "pydantic", "pytest"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "?"))
    except ImportError as exc:
        print(name, "missing:", exc)
PY
  "$python" -m raynixl doctor
}

core() { # built in place from what the environment has: no network
  if "$python" -c 'import raynixl._native' 2>/dev/null; then
    echo "the compiled core is here"
    return 0
  fi
  "$python" -c 'import nanobind, scikit_build_core' || { echo "nanobind and scikit-build-core are needed"; return 1; }
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
    -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" &&
    cmake --build build/gpu && cp build/gpu/_native*.so raynixl/ && "$python" -c 'import raynixl._native'
}

in_order() { # of files of tests: what no GPU has run yet first, what takes longest last
  local one place
  for one in "$@"; do
    case $one in */test_moe.py) place=1 ;; */test_deep_ep.py | */test_arithmetic.py | */test_weights.py | */test_collectives.py) place=2 ;; */test_cycles.py) place=4 ;; *) place=3 ;; esac
    echo "$place $one"
  done | sort | cut -d ' ' -f 2-
}

tests() { # each file in a process of its own: a kernel that fails takes the context of its process with it
  local word files=() options=() code=0 log=$out/tests.txt told count=0
  for word in $tests; do
    if [ -d "$word" ]; then files+=($(in_order $(find "$word" -name 'test_*.py')))
    elif [ -e "${word%%::*}" ]; then files+=("$word")
    else options+=("$word"); fi
  done
  : >"$log"
  for word in "${files[@]}"; do
    echo "-- $word" >>"$log"
    # in the foreground: what ends the step ends this, too
    timeout --foreground --kill-after=5 "$(limit_of file)" "$python" -m pytest -q --tb=short -m gpu -o faulthandler_timeout=20 \
      "${options[@]}" "$word" >>"$log" 2>&1
    case $? in
      0 | 5) ;; # 5: none is selected
      124 | 137) code=1; echo "ran past its limit of $(limit_of file) s" >>"$log" ;;
      *) code=1 ;;
    esac
    told=$(tail -n 1 "$log")
    [[ $told =~ ([0-9]+)\ passed ]] && count=$((count + BASH_REMATCH[1]))
    echo "-- $word: $told"
  done
  [ $code = 0 ] || { grep -E '^(FAILED|ERROR|E  |ran past)' "$log" | cut -c1-300 | head -n 80; echo "all of it: $log"; }
  [ $count -gt 0 ] || { echo "no test passed: is there no GPU?"; return 1; }
  return $code
}

sanitizer() { # the kernels alone; not what spins until the host says so, since every launch is waited for here
  local tool check log code=0 words=($sanitized) ranks=(tests/gpu/test_moe.py -k "bits and (1-tokens or 1-experts or 1-slots)")
  [ ${#words[@]} -gt 0 ] && ranks=() || words=(tests/gpu/test_kernels.py tests/gpu/test_arithmetic.py
    -k "every_alignment or edges or lists or any_rows or fp8_and_scales")
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
    { echo "compute-sanitizer is not here"; return 1; }
  for check in memcheck racecheck; do
    log=$out/sanitizer-$check.txt
    # what we ask the driver about memory that is not a GPU's is an error to the tool, and not to us
    "$tool" --tool "$check" --report-api-errors no --error-exitcode 86 --log-file "$log" \
      "$python" -m pytest -q --tb=short -p no:cacheprovider -m gpu -o timeout=280 "${words[@]}" || code=1
    tail -n 1 "$log"
    grep -q 'ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards' "$log" || { echo "$check is not clean: $log"; code=1; }
    [ ${#ranks[@]} -gt 0 ] || continue
    # one rank in a process of its own, which is killed at the end: what is wrong is in its log by then, a summary is not
    "$tool" --tool "$check" --target-processes all --report-api-errors no --log-file "$out/sanitizer-$check-moe.%p.txt" \
      "$python" -m pytest -q --tb=short -p no:cacheprovider -m gpu -o timeout=280 "${ranks[@]}" || code=1
    if grep -hE '^=+ +(Error|Invalid|Misaligned|Uninitialized|.*Race reported)' "$out"/sanitizer-"$check"-moe.*.txt; then
      echo "$check is not clean: $out/sanitizer-$check-moe.*.txt"; code=1
    fi
  done
  return $code
}

bench() {
  # shellcheck disable=SC2086
  "$python" tools/gpu_tables.py --rounds "$rounds" --rows "$out/rows.jsonl" $words
}

export -f facts core tests in_order sanitizer bench limit_of
export python tests sanitized words rounds out limits
for step in $steps; do
  run_step "$step" bash -c "$step"
done

echo
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]} (logs in $out)"
  exit 1
fi
echo "all steps passed: $steps (logs in $out)"
