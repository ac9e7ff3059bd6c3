#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that an NVIDIA GPU is needed for, without network, in two calls of five and a half minutes at
# most: builds, tests, checks and measures. benchmarks/README.md says what comes out.
#
#   benchmarks/gpu.sh first            is it right, and how long does it take
#   benchmarks/gpu.sh second [JSON]    again what failed (in that file of a first call), then the
#                                      benchmark against all peers, Nsight Compute, racecheck
#   benchmarks/gpu.sh                  both
#   benchmarks/gpu.sh --dry-run ...    the same stages without a GPU, on tiny shapes
#
#   PYTHON     the interpreter that has torch (python3)
#   OUT        folder for gpu.json and gpu.tar.gz, and nothing else (out/gpu)
#   PFGM_DATA  folder with MNIST and CIFAR-10, which then take part in the benchmark
#
# Relative paths start at the repository's root. The exit status is 1 where anything failed.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
