# Two commands matter: `make demo` and `make test`. Each does all its own set-up in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
RUNNABLE := .venv/.runnable
INSTALLED := .venv/.installed

.PHONY: demo demo-full showcase test runtime check format slow sanitize vnni arm gpu compat lock docs coverage clean

demo: $(RUNNABLE) runtime
	$(BIN)/python -m owl_deploy.demo --output demo

# Half an hour: two more settings, and stock ONNX Runtime in more precisions.
demo-full: $(RUNNABLE) runtime
	$(BIN)/python -m owl_deploy.demo --full --output demo-full

# Hours: Qwen2.5-Coder-1.5B, from its package to a decision. Run again, it goes on.
# make showcase ARGS="--every 4 --skip llama.cpp" takes less.
showcase: $(INSTALLED) runtime
	$(BIN)/python -m owl_deploy.showcase --allow-code --output showcase $(ARGS)

# A process a core, four at most: each holds torch, and what a file's tests share is made once. In
# the order of testpaths: by their number of tests the longest files would come last.
BESIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED) runtime
	$(BIN)/owl engines install deepsparse
	$(BIN)/python -m pytest $(BESIDE)

# The sparse engine's library. Without a compiler or ONNX Runtime's header the rest works all the same;
# without Bubblewrap no program that a model wrote is run.
NEEDED := g++ cmake libonnxruntime-dev bubblewrap
runtime: $(RUNNABLE)
	@{ test -f /usr/include/onnxruntime/onnxruntime_c_api.h && command -v bwrap >/dev/null; } || \
		! command -v apt-get >/dev/null || test -n "$(OWL_NO_APT)" || \
		{ echo "Installing the Debian packages $(NEEDED) (set OWL_NO_APT=1 to leave that out) ..."; \
		(apt-get update -qq; for package in $(NEEDED); do apt-get install -y -qq $$package; done) \
			>/dev/null 2>&1; } || true
	@$(BIN)/python -m owl_deploy.runtime.build $(if $(CI),--werror) || echo "The engine owl is left out; all else works."

CPP := owl_deploy/runtime/csrc/*
check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/checks

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# Minutes on 2 cores, or environments of their own (SparseML 1.8, llm-compressor).
slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/unit tests/integration tests/slow

# The sparse engine's tests on a library that stops at a read out of bounds or undefined behaviour.
# Python itself is not built so: hence the preloading, and no word about what it leaks. ASan's fake
# stack, which finds uses after return, does not align to the 64 bytes that AVX-512 registers want.
# A mutant may ask for more memory than there is: it gets an exception, as it would without ASan.
# What is freed is kept back in 8 MB only, since tests measure what a process keeps.
# OWL_MUTANTS=10000 runs so many mutated models instead of 400.
sanitize: $(INSTALLED)
	$(BIN)/python -m owl_deploy.runtime.build --werror --sanitize -o build/sanitized/libowl_runtime.so
	OWL_RUNTIME_LIBRARY=$(CURDIR)/build/sanitized/libowl_runtime.so \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:quarantine_size_mb=8 \
		UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest --capture=sys -p no:faulthandler tests/unit/runtime

# The kernels for AVX-VNNI, in AVX-512's encoding, on a processor that has only that.
vnni: $(INSTALLED)
	$(BIN)/python -m owl_deploy.runtime.build --werror --evex -o build/evex/libowl_runtime.so
	OWL_RUNTIME_LIBRARY=$(CURDIR)/build/evex/libowl_runtime.so \
		$(BIN)/python -m pytest -k avxvnni tests/unit/runtime

# The kernels' tests on an emulated Arm processor.
arm: $(INSTALLED)
	tests/slow/arm.sh

compat: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/slow/test_compatibility.py

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# The pages as a site in build/site. Nothing is fetched.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# The share of lines that unit and integration tests run, the processes that they start included.
coverage: $(INSTALLED) runtime
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(TESTS)

# torch stays a range: its CPU build has a local version that no index but its own serves.
lock: $(INSTALLED)
	$(BIN)/pip-compile --quiet --upgrade --no-header --no-annotate --strip-extras \
		--extra demo --extra all --extra docs --extra dev --no-emit-find-links --no-emit-index-url \
		--unsafe-package torch --unsafe-package pip --unsafe-package setuptools \
		--output-file requirements/dev.lock pyproject.toml
	sed -i '/^#/d;/^$$/d' requirements/dev.lock
	grep -o 'torch>=[^"]*' pyproject.toml >> requirements/dev.lock

# What the demo needs; a developer's tools come on top.
$(RUNNABLE): pyproject.toml requirements/dev.lock
	@echo "Setting up .venv (a minute, downloads aside) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/dev.lock scikit-build-core
	$(BIN)/python -m pip install --quiet --constraint requirements/dev.lock --no-build-isolation -e '.[demo]'
	@touch $@

$(INSTALLED): $(RUNNABLE)
	$(BIN)/python -m pip install --quiet -r requirements/dev.lock
	@touch $@

clean:
	rm -rf .venv demo demo-full build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
