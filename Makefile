# make train   set everything up, then train real data under horovodrun
# make test    set everything up, then run all tests
#
# Variables: PYTHON (interpreter for the virtual environment), TORCH (what pip installs; add an index to choose a build),
# NP (ranks of `make train`), ARGS (options of what is run). HOROVOD_* environment variables reach Horovod's build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
NP ?= 2
VENV ?= .venv

bin := $(VENV)/bin
kernels := $(wildcard csrc/cpu/*)

.PHONY: train test setup lint kernels clean

train: setup
	$(bin)/horovodrun -np $(NP) --gloo $(bin)/python benchmarks/train.py $(ARGS)

test: setup
	$(bin)/pytest $(ARGS)

setup: $(VENV)/plugin

lint: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

kernels: setup
	$(bin)/python benchmarks/kernels.py $(ARGS)

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ds_horovod needs Python 3.10 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet $(TORCH) numpy
	touch $@

$(VENV)/horovod: $(VENV)/torch scripts/install_horovod.sh
	scripts/install_horovod.sh $(VENV)
	touch $@

# Editable, so that only a change of the kernels or of the packaging installs it again.
$(VENV)/plugin: $(VENV)/horovod setup.py pyproject.toml $(kernels)
	$(bin)/python -m pip install --quiet --editable '.[benchmarks,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info ds_horovod/*.so
