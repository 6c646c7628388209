# Everything on a fresh machine: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The lines of the C++/CUDA build; the install is redone when one of them changes.
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)
BENCHMARKS := conv2d conv_bn_relu aspp pyramid_pool upsample_cross_entropy upsample_argmax dense_crf domain_transform dispatch errors models
EXTRAS := segmodels,data,weights,test,lint

.PHONY: install demo test test-sanitize test-triton lint bench clean

install: $(VENV)/.installed

$(VENV)/.tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 numpy setuptools wheel pybind11 cmake ninja
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	$(BIN)/pip install -q -c constraints.txt --no-deps triton || echo "Triton is not available here: going on without it"
	touch $@
	$(BIN)/python -m atrous_kernels

demo: install
	$(BIN)/python -m segmodels.demo

test: install
	$(BIN)/python -m pytest -q

# The op tests and a fuzz on a library of their own, built with AddressSanitizer and UndefinedBehaviorSanitizer.
test-sanitize: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.sanitized

# The Triton kernels, interpreted and compiled, under another version: make test-triton VERSION=3.6.0 (its interpreter needs an
# older NumPy). Tried: 3.6.0, 3.7.0, 3.8.0, 3.9.0.
VERSION ?= 3.9.0
TRITON := build/triton-$(VERSION)
test-triton: install
	$(BIN)/pip install -q --upgrade --no-deps --target $(TRITON) triton==$(VERSION) $(if $(filter 3.6%,$(VERSION)),"numpy<2.4")
	PYTHONPATH=$(CURDIR)/$(TRITON) $(BIN)/python -m pytest -q tests/triton

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	for name in $(BENCHMARKS); do \
	  $(BIN)/python -m pytest benchmarks/bench_$$name.py --benchmark-enable --benchmark-json=benchmarks/results/$${name}_cpu.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf build *.egg-info atrous_kernels/_lib atrous_kernels/*.so
