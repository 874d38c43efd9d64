# The one task runner. Needs Python >= 3.11, make, and a package index.
#
#   make demo          fine-tune a small encoder with LoRA on the CPU or GPU at hand
#   make test          one test of each promise, in under five minutes on two cores
#   make test-slow     the tests that take longer
#   make test-faults   more runs that are killed, stopped, starved and damaged: docs/reliability.md
#   make test-jobs     the image, Kubernetes, Slurm, several nodes, an installation from the lock; needs Debian and root
#   make test-lowest   `make test` with the lowest versions that pyproject.toml admits
#   make test-newest  `make test` with the newest releases, pre-releases too, whatever pyproject.toml admits
#   make bench-quick   hf_finetune against its peers, small: ten minutes at most on two cores
#   make bench         all of it: BENCH="--sst2 FOLDER --gsm8k FOLDER --llama FOLDER"; goes on where it was stopped
#   make lint          style, format, types
#   make audit         are there advisories about what is locked? Fails where that can't be asked: docs/security.md
#   make sbom          build/sbom.json, CycloneDX, of the environment at ENV=.venv
#   make docs          the documentation as a site in build/site
#   make lock          renew constraints.txt, constraints-lowest.txt and requirements/
#   make clean         remove environments and caches
#
# Where the package index has only CUDA builds of torch and you want the small CPU build:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo

PYTHON ?= python3
TORCH_INDEX ?=
# Empty to see all that pip says: make PIP_QUIET= demo
PIP_QUIET ?= -qq
WORKERS ?= 2
# Further options of pytest for the test targets, e.g. PYTEST_OPTIONS=--last-failed
PYTEST_OPTIONS ?=
# What `make bench` is to use, and whatever else `python -m benchmarks.race --help` knows.
BENCH ?=
# Options of pip-audit for `make audit`, e.g. AUDIT="--vulnerability-service osv".
AUDIT ?=
# The environment that `make sbom` lists.
ENV ?= .venv

TORCH_FLAGS = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Errors only. Modules are compiled when they are first imported: most never are, and compiling all takes as long as
# unpacking them. What is compiled must be kept then, or every process spends ten seconds on it, again and again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = -m pip install $(PIP_QUIET) --no-compile --disable-pip-version-check $(TORCH_FLAGS)
RACE = HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.race $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(BENCH)
PYTEST = -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_OPTIONS)
TORCH_PIN := $(shell grep '^torch==' constraints.txt)
# pip's lines without this project, without pip, and without the local tags of builds, e.g. +cpu.
FREEZE = -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed -E 's/\+[A-Za-z0-9.]+$$//'

.PHONY: demo test test-slow test-faults test-jobs test-lowest test-newest bench-quick bench lint audit sbom docs lock clean
.DELETE_ON_ERROR:

# What to install with, the constraints, the extras.
define install
	@echo "installing torch, transformers and what they need into $(@D): one to three minutes, 1.5 GB, more with CUDA"
	@began=$$(date +%s); $(1) $(INSTALL) -c $(2) -e '.[$(3)]' || \
		{ echo "pip failed; see all of what it does: make PIP_QUIET= $(MAKECMDGOALS)" >&2; exit 1; }; \
		echo "installed in $$(($$(date +%s) - began)) s"
endef

demo: .venv/demo.stamp
	@echo "training recipes/quickstart.yaml: which customers' problems are solved? A minute or two on two cores"
	@. .venv/bin/activate && hf-finetune train --processes auto recipes/quickstart.yaml training.log_every=25 --restart
	@echo "A guess is right for half of the messages: compare the test accuracy. Before the commands above: . .venv/bin/activate"
	@echo "Next: your own data, docs/first-recipe.md. Does everything work on this machine? make test"

# Threads of torch that wait for each other spin, and several tests run at once: one would wait on another's time.
test test-slow test-faults test-lowest test-newest: export OMP_WAIT_POLICY ?= PASSIVE

test: .venv/test.stamp
	.venv/bin/python $(PYTEST) -m "not slow and not faults and not jobs and not gpu"

test-slow: .venv/test.stamp
	.venv/bin/python $(PYTEST) -m "slow and not jobs and not gpu"

test-faults: .venv/test.stamp
	.venv/bin/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_OPTIONS) -m faults tests/faults

test-jobs: .venv/test.stamp
	.venv/bin/python -m pytest $(PYTEST_OPTIONS) -m jobs tests/jobs

test-lowest: .venv-lowest/test.stamp
	.venv-lowest/bin/python $(PYTEST) -m "not slow and not faults and not jobs and not gpu and not lint"

# Anew each time: what was newest last week is not. pip names the bounds that are passed, and goes on.
test-newest: DIRECT = $(shell sed -n '/^dependencies/,/^]/s/^ *"\([^>]*\)>=.*/\1/p' pyproject.toml)
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(INSTALL) -e '.[test]'
	.venv-newest/bin/python $(INSTALL) --upgrade --pre $(DIRECT)
	.venv-newest/bin/python $(PYTEST) -m "not slow and not faults and not jobs and not gpu and not lint"

# Anew each time, and within ten minutes, of which making .venv takes some.
bench-quick: BEGAN := $(shell date +%s)
bench-quick: .venv/demo.stamp
	rm -rf runs/bench-quick
	$(RACE) --quick --began $(BEGAN) --budget 570 --timeout 150

bench: .venv/demo.stamp
	$(RACE)

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

audit: .venv/test.stamp
	.venv/bin/python -m supply.audit constraints.txt $(wildcard requirements/*.txt) -- $(AUDIT)

sbom: .venv/test.stamp
	mkdir -p build
	.venv/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o build/sbom.json $(ENV)/bin/python

docs: .venv-docs/docs.stamp
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/docs.stamp: requirements/docs.txt | .venv-docs/bin/python
	.venv-docs/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements/docs.txt
	touch $@

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(call install,.venv/bin/python,constraints.txt,demo)
	@touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(call install,.venv/bin/python,constraints.txt,test)
	@touch $@ .venv/demo.stamp

.venv-lowest/test.stamp: pyproject.toml constraints-lowest.txt | .venv-lowest/bin/python
	$(call install,.venv-lowest/bin/python,constraints-lowest.txt,test)
	@touch $@

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $*

lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(INSTALL) '$(TORCH_PIN)' -e '.[test]'
	echo "# The tested set, exactly. Made by \`make lock\`; any build of the torch version fits." > constraints.txt
	.venv-lock/bin/python $(FREEZE) >> constraints.txt
	sed -n '/^dependencies/,/^]/s/^ *"\([^>]*\)>=\([^,]*\),.*/\1==\2/p' pyproject.toml | grep -v '^torch==' > .venv-lock/lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python $(INSTALL) -c .venv-lock/lowest.txt '$(TORCH_PIN)' -e '.[test]'
	echo "# The lowest versions that pyproject.toml admits, torch excepted. Made by \`make lock\`." > constraints-lowest.txt
	.venv-lowest/bin/python $(FREEZE) >> constraints-lowest.txt
	.venv-lock/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements/lock.txt
	PATH="$(CURDIR)/.venv-lock/bin:$$PATH" .venv-lock/bin/python -m supply.lock $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-* .jobs .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
