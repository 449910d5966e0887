# libhmm. `make demo` runs the main job, `make test` runs all tests; `make help` lists everything.
# Needed: Rust, a C compiler, Python 3.11 or newer, make. Everything else is fetched and built here.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:

CARGO ?= cargo
PYTHON ?= python3
CFLAGS ?= -O2 -g
PREFIX ?= /usr/local

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
CAPI := $(TARGET)/capi
SONAME := libhmm.so.0.1
VENV := $(CURDIR)/.venv
PYTHON_PACKAGES := 'maturin==1.16.0' 'numpy>=2,<3' 'pytest>=9,<10'
XTASK := $(CARGO) run --quiet --package xtask --
DMIRROR := $(TARGET)/release/libhmm_dmirror.so
EXAMPLES := $(patsubst examples/c/%.c,$(TARGET)/demo/%,$(wildcard examples/c/*.c))

.PHONY: demo test check bench stress soak matrix promises kselftest clean
.PHONY: help lib examples dmirror python header fmt install

demo: examples python
	$(TARGET)/demo/wordindex
	$(VENV)/bin/python examples/python/oversubscribe.py

test: examples python
	$(XTASK) matrix --quick
	$(XTASK) promises --check
	$(XTASK) test

check:
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(XTASK) gen-header --check
	$(XTASK) layering
	$(XTASK) kernel-names
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

bench:
	$(CARGO) run --release --package hmm-tests --bin bench

stress:
	HMM_STRESS=long $(XTASK) test --release --package hmm-tests --suite rust --time-limit 3600 stress

promises: lib
	$(XTASK) promises

# MINUTES=n, HMM_ENGINE and HMM_INJECT as for every program
MINUTES ?= 30
soak:
	$(CARGO) build --release --package hmm-tests --bin soak
	$(TARGET)/release/soak --seconds $$(( $(MINUTES) * 60 ))

# MATRIX holds options: make matrix MATRIX=--quick
matrix: examples python
	$(XTASK) matrix $(MATRIX)

# KSELFTEST holds options: make kselftest KSELFTEST='--runs 10 --engine uffd'
kselftest: dmirror
	$(XTASK) kselftest $(KSELFTEST)

clean:
	$(CARGO) clean
	rm -rf $(TARGET)/demo $(VENV) .pytest_cache hmm-py/.pytest_cache
	rm -f hmm-py/python/hmm/*.so
	find hmm-py examples -name __pycache__ -prune -exec rm -rf {} +

help:
	@echo 'make demo      build everything and run the main job: a C program, then a Python script'
	@echo 'make test      run all tests; ends with N passed, N failed, N skipped'
	@echo 'make check     formatting, lints, header freshness, layering, names, documentation'
	@echo 'make bench     measure against bare baselines; writes target/bench.json'
	@echo 'make stress    the stress tests in their long form'
	@echo 'make soak      everything at once, for MINUTES=30: threads, devices, layout changes, forks, checked all the while'
	@echo 'make matrix    the tests in environments that lack something; MATRIX=--quick for the short form'
	@echo 'make promises  the tests of hmm.txt'"'"'s promises on every engine; writes docs/PROMISES.md'
	@echo 'make kselftest the kernel'"'"'s own HMM tests, unmodified, on libhmm; fetches their source from Debian once'
	@echo 'make lib       the C library, in target/capi'
	@echo 'make examples  the C examples, in target/demo'
	@echo 'make dmirror   the kernel'"'"'s test device, as target/release/libhmm_dmirror.so for LD_PRELOAD'
	@echo 'make python    a virtual environment in .venv with the Python module in it'
	@echo 'make header    generate include/hmm.h again'
	@echo 'make fmt       format the Rust sources'
	@echo 'make install   install the C library under PREFIX (now $(PREFIX))'
	@echo 'make clean     remove everything that was built'

# Programs ask the loader for the name with the version, which cargo does not create.
lib:
	$(CARGO) build --profile capi --package hmm-capi
	$(CARGO) build --release --package hmm-preload
	ln -sfn libhmm.so $(CAPI)/$(SONAME)

examples: $(EXAMPLES)

$(TARGET)/demo/%: examples/c/%.c include/hmm.h Makefile | lib
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -Wall -Wextra $(CFLAGS) -Iinclude -o $@ $< -L$(CAPI) -Wl,-rpath,$(CAPI) -lhmm -lm -pthread

# libhmm_preload.so lies beside it, libhmm in the folder of the C library, or beside it when installed. Loaded as an
# auxiliary library, the former stands before libc (examples/dmirror/shim.c). No lazy binding: callbacks call libhmm.
dmirror: $(DMIRROR)

$(DMIRROR): $(wildcard examples/dmirror/*.[ch]) include/hmm.h Makefile | lib
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -Wall -Wextra -Werror $(CFLAGS) -fPIC -fvisibility=hidden -shared -Iinclude -o $@ \
		$(filter %.c,$^) -L$(CAPI) -lhmm -pthread -Wl,--auxiliary=libhmm_preload.so \
		-Wl,-soname,$(@F) -Wl,-rpath,'$$ORIGIN:$$ORIGIN/../capi' -Wl,-z,now -Wl,-z,defs -Wl,-z,nodelete

python: $(VENV)/ready
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/maturin develop --quiet --release --manifest-path hmm-py/Cargo.toml

$(VENV)/ready: Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PYTHON_PACKAGES)
	touch $@

header:
	$(XTASK) gen-header

fmt:
	$(CARGO) fmt --all

install: lib
	$(XTASK) install --prefix $(PREFIX)
