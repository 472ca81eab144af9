#!/usr/bin/env bash
# Everything that needs a GPU, in one run of a few minutes: `bench/gpu.sh [SECTION...]`, by default all in this order:
#   build     build and install in place; then put back the libemovec.so at $LIB (default: the one in emovec/) if there was one
#   abi       the library, built here or elsewhere, loads here and is right
#   host      instead of build: only the host-side module, to test and time the library that was brought (not among the default sections)
#   check     the tests that need a GPU
#   sanitize  compute-sanitizer's memcheck and racecheck over a small script
#   profile   ncu over one call of each kind (not among the default sections); writes profile.{ncu-rep,txt,csv} and source.csv
#   time      bench/gpu.py: ceilings, prefill, decode; writes gpu.json
# Each section has a limit, and one that fails does not stop the next. Logs go to $OUT (default: build/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
LIB=${LIB:-emovec/libemovec.so}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/tests

section() { # NAME SECONDS LINES COMMAND...
  local name=$1 limit=$2 lines=$3 start=$SECONDS status
  shift 3
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n "$lines" "$OUT/$name.log"
  echo "== $name: exit $status after $((SECONDS - start)) s"
  return $status
}

build() {
  # What was built elsewhere is what users get, so it is what is tested and timed.
  [ ! -f "$LIB" ] || cp "$LIB" "$OUT/../carried.so"
  rm -rf build/cmake-* emovec/*.so
  "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
  "$PYTHON" -c "from emovec import _host; print(_host.kernels())"
  g++ --version | head -1
  g++ -print-file-name=libstdc++.so
  ldd emovec/libemovec.so
  [ ! -f "$OUT/../carried.so" ] || cp "$OUT/../carried.so" emovec/libemovec.so
}

abi() {
  "$PYTHON" bench/gpu.py small
}

# Only the host-side module, for this Python, beside the library that was brought.
host() {
  ln -sfn ../kernels/triton emovec/triton  # as an installation has it
  "$PYTHON" -c "import emovec._host" 2>/dev/null && return
  cmake -S . -B build/cmake-gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DEMOVEC_OUTPUT="$PWD/emovec" &&
    cmake --build build/cmake-gpu --target _host
}

check() {
  local files=(tests/test_cuda.py tests/test_cuda_stream.py tests/test_cuda_binary.py tests/test_hook_captured.py) workers=()
  [ -f tests/test_triton.py ] && files+=(tests/test_triton.py)
  "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n 12)
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -p no:cacheprovider -m "not engine" -k "not length" "${workers[@]}" --maxfail=40 --tb=short --durations=5 "${files[@]}"
}

sanitize() {
  local tool status=0
  for tool in memcheck racecheck; do
    echo "-- $tool"
    timeout 60 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" bench/gpu.py small || status=$?
  done
  return $status
}

profile() {
  ncu --clock-control none --set full -f -o "$OUT/profile" -k 'regex:portable|decode|stream' "$PYTHON" bench/gpu.py profile >/dev/null
  ncu --import "$OUT/profile.ncu-rep" --csv --page details >"$OUT/profile.csv"
  ncu --import "$OUT/profile.ncu-rep" --page details >"$OUT/profile.txt"
  ncu --import "$OUT/profile.ncu-rep" --csv --page source >"$OUT/source.csv"
  "$PYTHON" - "$OUT/profile.csv" <<'SUMMARY'
import csv, sys
shown = ("Duration", "Elapsed Cycles", "DRAM Throughput", "L2 Cache Throughput", "Executed Ipc Active", "No Eligible", "Registers Per Thread")
rows = list(csv.DictReader(line for line in open(sys.argv[1]) if line.startswith('"')))
for launch in dict.fromkeys(row["ID"] for row in rows):
    mine = [row for row in rows if row["ID"] == launch]
    name = mine[0]["Kernel Name"].replace("<unnamed>::", "")[:60]
    print(launch, name, mine[0]["Grid Size"], *(f"{r['Metric Name']} {r['Metric Value']} {r['Metric Unit']};" for r in mine if r["Metric Name"] in shown))
SUMMARY
}

export -f abi build host check sanitize profile
export OUT PYTHON LIB
[ $# -gt 0 ] || set -- build abi check sanitize time
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
for name in "$@"; do
  case $name in
    abi) section abi 60 8 bash -c abi ;;
    build) section build 150 16 bash -c build ;;
    host) section host 100 4 bash -c host ;;
    check) section check 150 24 bash -c check ;;
    sanitize) section sanitize 120 16 bash -c sanitize ;;
    profile) section profile 150 40 bash -c profile ;;
    time) section time 150 70 "$PYTHON" bench/gpu.py time --out "$OUT/gpu.json" ;;
    *) echo "no section $name" ;;
  esac
done
