# From a fresh clone, with nothing but Python and make: `make demo`, `make test`. As root on Debian or Ubuntu:
# `make test-slurm`, which brings a SLURM cluster of two virtual nodes up, and down again.
#
#   PYTHON=python3.12   the interpreter that makes the environment (3.10 or newer)
#   VENV=path           an environment that is already there, or where to make one
#   ARGS="..."          passed on to pytest or to the demo
#
# pip's own variables work, such as PIP_EXTRA_INDEX_URL for an index with a torch without CUDA.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
EXTRAS := .[test,dev,docs]
APT := $(if $(filter 0,$(shell id -u)),,sudo -n )env DEBIAN_FRONTEND=noninteractive apt-get -qq
SLURM_PACKAGES := slurm-wlm slurm-wlm-basic-plugins munge libpmix2 libpmix-dev
# Configuration, logs and state of the cluster; they stay.
SLURM_FOLDER ?= /tmp/kfac-dist-slurm
# A second implementation for the tests; its own requirements would bring another torch.
ORACLE := requirements-oracle.txt
# Changes with the requirements and with the place of this clone, to which the installation points.
STAMP := $(VENV)/.kfac-dist-$(shell (cat pyproject.toml constraints.txt $(ORACLE); pwd) | cksum | cut -d ' ' -f 1)

.PHONY: install demo bench race soak test test-slurm lint docs format

install: $(STAMP)

demo: $(STAMP)
	$(RUN) -m benchmarks.demo $(ARGS)

bench: $(STAMP)
	$(RUN) -m benchmarks.steps $(ARGS)
	$(RUN) -m benchmarks.scaling

race: $(STAMP)
	$(RUN) -m benchmarks.race $(ARGS)

soak: $(STAMP)
	$(RUN) -m benchmarks.soak $(ARGS)

test: $(STAMP)
	@command -v shellcheck >/dev/null || { $(APT) update && $(APT) install -y shellcheck >/dev/null; } || \
	  echo "shellcheck is missing and could not be installed: the job scripts go unchecked"
	@command -v chromium >/dev/null || { $(APT) update && $(APT) install -y --no-install-recommends chromium >/dev/null; } || \
	  echo "chromium is missing and could not be installed: the study's report is not opened"
	$(RUN) -m pytest -m 'not slurm' --durations=20 $(ARGS)

# The cluster goes down however the tests end.
test-slurm: $(STAMP)
	@dpkg --status $(SLURM_PACKAGES) >/dev/null 2>&1 || \
	  { $(APT) update && $(APT) install -y --no-install-recommends $(SLURM_PACKAGES) >/dev/null; }
	@trap 'tests/slurm/down.sh $(SLURM_FOLDER)' EXIT; trap 'exit 130' INT TERM; \
	  tests/slurm/up.sh $(SLURM_FOLDER) && \
	  SLURM_CONF=$(abspath $(SLURM_FOLDER))/slurm.conf $(RUN) -m pytest -m slurm --durations=20 $(ARGS) tests/slurm

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_floors.py

# A warning is an error: a link or a name that does not exist.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

format: $(STAMP)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "PYTHON=$(PYTHON) is no Python 3.10 or newer; name one that is: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# An environment that holds everything already needs no network; otherwise torch comes first, by itself, because it is
# by far the largest and the one that is pinned.
$(STAMP): | $(RUN)
	@echo "Installing into $(VENV) (once; torch is large)"
	@$(PIP) install --quiet --no-index --no-build-isolation -c constraints.txt -e '$(EXTRAS)' >/dev/null 2>&1 || \
	  { $(PIP) install -c constraints.txt torch && $(PIP) install -c constraints.txt -e '$(EXTRAS)'; }
	@$(PIP) install --quiet --no-index --no-deps -r $(ORACLE) >/dev/null 2>&1 || $(PIP) install --no-deps -r $(ORACLE)
	@rm -f $(VENV)/.kfac-dist-*
	@touch $@
