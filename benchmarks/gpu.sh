#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs an NVIDIA GPU, in one command, under eight minutes and without network:
# builds, runs the tests on the GPU, compute-sanitizer on small shapes, and the benchmarks.
#
#   PYTHON     the interpreter that has torch (python3)
#   OUT        folder for the results' JSON and the logs (benchmarks/results)
#   PFGM_DATA  folder with MNIST and CIFAR-10, which then take part
#
# Relative paths start at the repository's root.
#
# A stage that fails or takes too long is reported, the later ones still run, and the exit status is
# 1. A stage whose tool is missing is skipped, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(realpath "$out")
total=455 # seconds for all stages: the benchmark gets what the others leave

# Some containers set it, and float32 products would no longer be float32.
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1

gpu='
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"benchmarks/gpu.sh needs torch, which {sys.executable} does not have: {error}")
if not torch.cuda.is_available():
    sys.exit(f"benchmarks/gpu.sh needs an NVIDIA GPU; torch {torch.__version__} finds none here")
print("%d%d" % torch.cuda.get_device_capability(), torch.cuda.get_device_name(), sep="\t")
'
device=$("$python" -c "$gpu")
rm -f "$out"/gpu-*.log # of an earlier run
IFS=$'\t' read -r arch name <<<"$device"
echo "$name, sm_$arch, $("$python" --version)"

has() { "$python" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }
for module in triton ninja pybind11 setuptools pytest hypothesis pytest_benchmark pykeops; do
  has "$module" || echo "not installed: $module"
done

stages=()
failed=0

# stage NAME SECONDS COMMAND...: runs it with its output in OUT/gpu-NAME.log
stage() {
  local stage=$1 budget=$2 log=$out/gpu-$1.log start=$SECONDS status=0
  shift 2
  if ((budget > total - SECONDS)); then budget=$((total - SECONDS)); fi
  if ((budget <= 0)); then
    report "$stage" "FAILED: no time left" 0
    failed=1
    return
  fi
  # Interrupted, pytest still writes what it has; what does not stop then is killed.
  timeout --signal=INT --kill-after=10 "$budget" "$@" >"$log" 2>&1 || status=$?
  if ((status == 0)); then
    report "$stage" passed $((SECONDS - start))
    return
  fi
  failed=1
  tail -n 20 "$log"
  if ((status == 124 || status == 137)); then
    report "$stage" "FAILED: not done within $budget s, see $log" $((SECONDS - start))
  else
    report "$stage" "FAILED with status $status, see $log" $((SECONDS - start))
  fi
}

report() {
  stages+=("$(printf '%-10s %4d s  %s' "$1" "$3" "$2")")
  echo "${stages[-1]}"
}

# For this GPU alone: one architecture is built in a fraction of the time of all.
stage build 75 env "PFGM_CUDA_ARCHS=$arch" \
  "$python" -m pip install --no-build-isolation --no-deps --editable .

# What the kernels' instructions do, beside what the emulated ones do that the tests run elsewhere.
nvcc=$(command -v nvcc || true)
if [[ -z $nvcc && -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
  nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
fi
if [[ -z $nvcc ]]; then
  report intrinsics "skipped: nvcc is not installed" 0
else
  stage compile 30 "$nvcc" -std=c++17 "-arch=sm_$arch" -o "$out/gpu-intrinsics" \
    tests/cuda/emulation/device_check.cu
  stage intrinsics 10 "$out/gpu-intrinsics"
  rm -f "$out/gpu-intrinsics"
fi

# A failed build leaves the backends that need none, so nothing below depends on it.
if has pytest && has hypothesis; then
  workers=()
  # Most of the time goes into compiling kernels, on the CPU.
  if has xdist; then workers=(-n 4); fi
  stage tests 110 "$python" -m pytest -q tests "${workers[@]}" --durations=5 \
    -k "(triton or cuda) and not aot" --ignore=tests/package
else
  report tests "FAILED: pytest and hypothesis are needed" 0
  failed=1
fi

sanitizer=$(command -v compute-sanitizer || true)
if [[ -z $sanitizer && -x ${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer ]]; then
  sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
fi
# Also compiles the kernels that the sanitizer then finds compiled.
stage values 40 "$python" -m benchmarks.gpu_small
for tool in memcheck racecheck; do
  if [[ -z $sanitizer ]]; then
    report "$tool" "skipped: compute-sanitizer is not installed" 0
  elif ! timeout 30 "$sanitizer" --tool "$tool" \
    "$python" -c "import torch; torch.zeros(1).cuda()" >"$out/gpu-$tool.log" 2>&1; then
    # Some virtual machines do not let it at the device.
    report "$tool" "skipped: compute-sanitizer cannot run here, see $out/gpu-$tool.log" 0
  else
    # Each tensor an allocation of its own: otherwise what is read or written beyond its end is a
    # neighbour's in the same block, and nobody notices.
    stage "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m benchmarks.gpu_small
  fi
done

# pytest-benchmark writes the JSON; without it there would be times that nothing can compare.
if has pytest && has pytest_benchmark; then
  stage benchmark "$total" "$python" -m benchmarks --out "$out"
else
  report benchmark "FAILED: pytest and pytest-benchmark are needed" 0
  failed=1
fi

echo
printf '%s\n' "${stages[@]}"
results=$(sed -n 's/^Saved as //p' "$out/gpu-benchmark.log" 2>/dev/null || true)
if [[ -n $results ]]; then
  echo
  "$python" -m benchmarks.report "$results"
fi
exit "$failed"
