# `make run` trains and `make test` tests; each first makes .venv and installs what it needs, where that is missing.

SHELL := bash
.DELETE_ON_ERROR:
.PHONY: help run test lint

SCRIPT ?= ppo_torch.py
ARGS ?=

# x_torch.py needs requirements/torch.txt; a script whose name ends in no backend gets all.txt
REQUIREMENTS := $(or $(filter torch jax mlx,$(lastword $(subst _, ,$(basename $(notdir $(SCRIPT)))))),all)
PYTHON := .venv/bin/python

# what was installed is gone with the Python that .venv was made from, after an upgrade of the system say
$(shell [ -x $(PYTHON) ] || rm -f .venv/installed-*)

help:
	@echo 'make run                                    train ppo_torch.py on CartPole-v1'
	@echo 'make run ARGS="--env-id Acrobot-v1"         the same script with other arguments (ARGS=--help lists them)'
	@echo 'make run SCRIPT=ppo_torch.py                any other script'
	@echo 'make test                                   the whole test suite (ARGS="-k gae" for a part)'
	@echo 'make lint                                   ruff: rules and format'

run: $(SCRIPT) .venv/installed-$(REQUIREMENTS)
	@$(PYTHON) $(SCRIPT) $(ARGS)

# Tests side by side, one a core; then those that compare times, alone. 5: none was chosen (by ARGS).
# Without a display MuJoCo renders through EGL, but only if told so.
test: .venv/installed-all
	@if [ "$$(uname)" = Linux ]; then export MUJOCO_GL=$${MUJOCO_GL:-egl}; fi; \
	$(PYTHON) -m pytest -m 'not clock' -n logical --dist worksteal $(ARGS); together=$$?; \
	$(PYTHON) -m pytest -m clock $(ARGS); alone=$$?; \
	case $$together$$alone in 00|05|50) ;; *) exit 1 ;; esac

lint: .venv/installed-all
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check

.venv/installed-all: $(wildcard requirements/*.txt)
.venv/installed-%: requirements/%.txt | $(PYTHON)
	@echo 'installing requirements/$*.txt into .venv (minutes, the first time)'
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip >/dev/null  # uv makes .venv without pip
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements/$*.txt
	@touch $@

# 3.11 first, of which the results were recorded.
# Each candidate is run before it is believed: pyenv's shims stand in PATH for versions that are not there.
$(PYTHON):
	@for python in $$(type -ap python3.11 python3.12 python3 python); do \
	    if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null; then \
	        echo "making .venv with $$python"; \
	        exec "$$python" -m venv --clear .venv; \
	    fi; \
	done; \
	echo 'This needs Python 3.11 or 3.12, with its venv module, as python3.11 or python3.12 in PATH; neither is there.' >&2; \
	exit 1
