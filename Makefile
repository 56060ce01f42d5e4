# make train   set everything up, then train real data under horovodrun; draws build/train.png
# make wheel   a wheel of the plugin in dist, for this Python and this kind of machine
# make test    set everything up, then run all tests
# make results  measure what is missing in RESULTS, then write the page of results; root, iproute2 and a day for all of it.
#               What another machine has measured cannot be continued: RESULTS=FOLDER begins anew
# make results-quick  the same with small models and few steps, in build/results: whether it works, not how fast
#
# Variables: PYTHON (interpreter for the virtual environment), TORCH (what pip installs; add an index to choose a build),
# NP (ranks of `make train`), ARGS (options of what is run), RESULTS (where JSON and figures are kept).
# HOROVOD_* environment variables reach Horovod's build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
NP ?= 2
VENV ?= .venv
BARE := build/without-horovod
RESULTS ?= benchmarks/results

bin := $(VENV)/bin
kernels := $(wildcard csrc/cpu/* csrc/shared/*)

page := $(RESULTS)/results.md
ifdef QUICK
kernel_args := --elements 1000000 --threads 1 --rounds 3
loopback_args := --num-warmup-batches 1 --num-batches-per-iter 1 --num-iters 2
train_args := --epochs 2
bandwidth_args := --quick
learning_args := --steps 5 --recipes none quantize-4
long_args := --steps 6 --recipes none quantize-4
timed_args := --quick --methods noop none quantize-4
speedup_args := --workers 1 2 --seeds 0 --recipes none onebit
else
learning_args := --seeds 0 1 2
long_args := --steps 3600 --recipes none quantize-4 sign-4.5%-momentum-lr-1.67
timed_args := --methods noop none fp16 onebit quantize-4 topk-1% sign-4.5% sign-18% ddp-powersgd-1 ddp-powersgd-4
loopback_args := --num-warmup-batches 3 --num-batches-per-iter 4 --num-iters 6
ifeq ($(RESULTS),benchmarks/results)
page := docs/results.md
report_args := --readme README.md
endif
endif

# Benchmarks that run side by side measure each other.
.NOTPARALLEL:

.PHONY: train wheel test test-without-horovod setup lint kernels results results-quick clean

train: setup
	$(bin)/horovodrun -np $(NP) --gloo $(bin)/python benchmarks/train.py --plot build/train.png $(ARGS)

# Side by side, in several processes: ARGS="-n 0 TEST" runs a test alone, ARGS="-m 'not jobs'" what starts no ranks.
test: setup
	$(bin)/pytest -n auto --dist loadgroup --no-loadscope-reorder $(ARGS)

# What needs no Horovod, where there is none: another environment, in which torch alone starts ranks.
test-without-horovod: $(BARE)/plugin
	$(BARE)/bin/python -c 'import importlib.util, ds_horovod; assert importlib.util.find_spec("horovod") is None'
	$(BARE)/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder -m "not jobs" $(ARGS)
	$(BARE)/bin/python -m pytest -n 1 --dist loadgroup tests/test_ddp.py -k "2- or gone"

$(BARE)/plugin: setup.py pyproject.toml $(kernels)
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet --upgrade pip
	$(BARE)/bin/python -m pip install --quiet $(TORCH) numpy
	$(BARE)/bin/python -m pip install --quiet --editable . 'pytest<9.2' pytest-xdist hypothesis pybind11
	touch $@

# Where auditwheel is installed, it makes a manylinux wheel of it, which other distributions take too.
wheel: $(VENV)/torch
	$(bin)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	if command -v auditwheel >/dev/null; then auditwheel repair --wheel-dir dist dist/ds_horovod-*-linux_*.whl; fi
	@ls dist/ds_horovod-*.whl

setup: $(VENV)/plugin

lint: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

kernels: setup
	$(bin)/python benchmarks/kernels.py $(ARGS)

results: setup $(addprefix $(RESULTS)/,kernels-cpu.json loopback-mlp-2.json loopback-mlp-4.json train-2.json)
	$(bin)/python benchmarks/bandwidth.py --json $(RESULTS)/bandwidth.json $(bandwidth_args)
	$(bin)/python benchmarks/bandwidth.py --json $(RESULTS)/steps-gpt-small.json --models gpt-small --hosts 4 \
		--rates 1gbit 100mbit $(timed_args)
	$(bin)/python benchmarks/convergence.py --task digits --workers 4 8 --json $(RESULTS)/convergence-digits.json $(learning_args)
	$(bin)/python benchmarks/convergence.py --task gpt-sgd --json $(RESULTS)/convergence-gpt-sgd.json $(learning_args)
	$(bin)/python benchmarks/convergence.py --task gpt-sgd --json $(RESULTS)/convergence-gpt-sgd-3600.json $(long_args)
	$(bin)/python benchmarks/convergence.py --task gpt-adamw --json $(RESULTS)/convergence-gpt-adamw.json $(learning_args)
	$(bin)/python benchmarks/speedup.py --json $(RESULTS)/speedup.json $(speedup_args)
	$(bin)/python benchmarks/model.py $(RESULTS)/bandwidth.json --json $(RESULTS)/model.json
	$(bin)/python benchmarks/report.py $(RESULTS) $(page) $(report_args)

results-quick: setup
	rm -rf build/results
	$(MAKE) results RESULTS=build/results QUICK=1

# Without other prerequisites: to measure again, delete the file.
$(RESULTS):
	mkdir -p $@

$(RESULTS)/kernels-cpu.json: | $(RESULTS)
	$(bin)/python benchmarks/kernels.py $(kernel_args) --json $@

$(RESULTS)/loopback-mlp-%.json: | $(RESULTS)
	$(bin)/horovodrun -np $* --gloo $(bin)/python benchmarks/synthetic.py --threads 1 $(loopback_args) \
		--compare none onebit topk noop --json $@

$(RESULTS)/train-%.json: | $(RESULTS)
	$(bin)/horovodrun -np $* --gloo $(bin)/python benchmarks/train.py $(train_args) --json $@

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
