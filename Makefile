# make demo       the whole job on real digits: train, sample, measure        (out/demo)
# make test       what an installation or a change is likely to break, in five minutes; real images
#                 too where PFGM_DATA names their folder
# make check      every test there is: those, and then what they leave out
# make mutants    mistakes put into the sources, and which tests find them    (docs/mutants.md)
# make sanitize   the CPU kernels under the address, undefined-behaviour and thread sanitizers
# make aot        what each Triton kernel becomes on each NVIDIA chip, with no GPU, by the Triton that
#                 is installed and by the oldest
# make lint       formatting, style and types
# make benchmark  the op against plain PyTorch, side by side                  (benchmarks/results)
# make pictures   the pictures of the README, from the demo and pfgm figures  (docs)
#
# Each sets up .venv first, once. TORCH is what pip installs for torch: for a CUDA or CPU build of
# your own choice, override it, e.g. make test TORCH="torch==2.11.0"

override PYTHON := $(or $(PYTHON),python3)
override TORCH := $(or $(TORCH),torch==2.13.0)

# Programs are run by -m: a script's first line cannot name each folder that .venv may lie in.
BIN := .venv/bin
CLANG_FORMAT := $(BIN)/python -c '__import__("clang_format").clang_format()'
CXX_SOURCES := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
READY := .venv/.ready
# tests/op/selection.py says what is in the parts of the tests. Two workers share the cores: a thread
# that waits has to leave its own.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2
# The Triton kernels run on the CPU under Triton's interpreter. In each test its products, and those
# of the emulated GPU, sum as the tensor cores of one kind of chip do (tests/cuda/tensor_core.py).
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PYTEST) -k triton
# The CUDA kernels run on the CPU on an emulated GPU, once with every test of the op and then with
# a search for races and for accesses out of bounds.
EMULATED := OMP_NUM_THREADS=1 $(BIN)/python tests/cuda/emulated.py
CUDA_TESTS := $(patsubst %,tests/cuda/test_%.py,cuda_direct cuda_sizes cuda_two_pass)
# What depends most on how they sum runs with both that are in use.
DENSE := (clusters or flat) and (test_float32 or without)
DENSE_TESTS := --interpret-all tests/op/test_accuracy.py tests/op/test_gradients.py
SEARCHED_TESTS := $(CUDA_TESTS) $(patsubst %,tests/op/test_%.py,gradients low_dimension nonfinite singular)

# The oldest Triton that is supported, beside the environment: nothing but the compiler is used of
# it. Where it cannot be had, what would compile with it is left out, and says so.
OLDEST_TRITON := build/triton-3.6

.PHONY: setup demo test check sanitize mutants aot lint format benchmark pictures clean

setup: $(READY)

$(READY): pyproject.toml setup.py csrc/ninja_build.py Makefile $(CXX_SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

$(OLDEST_TRITON): | $(READY)
	-$(BIN)/python -m pip install --quiet --no-deps --target $@ 'triton==3.6.*'

demo: $(READY)
	$(BIN)/python -m pfgm_kernels.cli demo --out out/demo

test: $(READY)
	$(PYTEST) --part thin
	$(INTERPRETED) --part thin --every-kernel tests/op tests/triton/test_triton.py \
	  tests/triton/test_tables.py
	$(EMULATED) plain -q -n 2 --part thin --every-kernel tests/op $(CUDA_TESTS)

# The lines of the Triton kernels are counted in few tests, which take twice as long for it.
check: test $(OLDEST_TRITON)
	$(PYTEST) --part rest
	$(INTERPRETED) --part rest tests/op tests/triton/test_tables.py
	$(INTERPRETED) --cov --part spread tests/op/test_gradients.py tests/triton/test_triton.py
	$(EMULATED) plain -q -n 2 --part rest tests/op
	for core in sm_80 sm_90; do \
	  export PFGM_TENSOR_CORE=$$core; \
	  $(INTERPRETED) -k "triton and $(DENSE)" $(DENSE_TESTS) && \
	  $(EMULATED) plain -q -n 2 -k "cuda and $(DENSE)" $(DENSE_TESTS) || exit 1; \
	done
	$(EMULATED) races -q -n 2 --part spread $(SEARCHED_TESTS)
	$(EMULATED) address -q -n 2 --part spread $(SEARCHED_TESTS)

sanitize: $(READY)
	$(BIN)/python tests/cpu/sanitize.py

mutants: $(READY)
	$(BIN)/python tests/mutants --table docs/mutants.md

aot: $(READY) $(OLDEST_TRITON)
	$(BIN)/python tests/triton/aot.py

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/python -m mypy

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

benchmark: $(READY)
	$(BIN)/python -m benchmarks

pictures: demo
	mkdir -p docs
	cp out/demo/samples.png out/demo/trajectories.png docs
	$(BIN)/python -m pfgm_kernels.cli figures --out docs/figures bias trajectories weights \
	  --data $(if $(PFGM_DATA),cifar10,digits)

clean:
	rm -rf .venv build out *.egg-info pfgm_kernels/*.so
