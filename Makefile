# `make sweep` and `make test` need Python 3.11 or newer and nothing else; `make help` lists the rest.

PYTHON ?= python3
EXTRAS ?= dev
ARGS ?=
RUN ?= figures
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

# An environment holds a stamp, written last, of what it was made of: the place and the pins. One that
# was interrupted, moved, edited or lost its interpreter is made anew; one that is right is not touched.
WANTED := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum) $(EXTRAS)
WANTED_TORCH := $(shell grep '^torch==' constraints.txt)
fresh = $(shell { [ "$$(cat $(1)/stamp)" = '$(2)' ] && $(1)/bin/python -Ic 'import pip' && echo yes; } 2>/dev/null)
version = $(shell '$(1)' -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
FRESH := $(call fresh,.venv,$(WANTED))
FRESH_TORCH := $(call fresh,.venv-torch,$(WANTED_TORCH))
ifneq ($(origin PYTHON),file) # chosen by hand
  ifneq ($(call version,$(PYTHON)),$(call version,.venv/bin/python))
    FRESH :=
  endif
endif

# One line if the interpreter cannot make an environment, nothing otherwise.
CHECK = import sys; v = sys.version_info; \
	old = "it is Python %d.%d; choose 3.11 or newer: make PYTHON=python3.12" % v[:2]; \
	bare = "it has no venv; on Debian or Ubuntu: apt install python%d.%d-venv" % v[:2]; \
	find = lambda name: __import__("importlib.util").util.find_spec(name); \
	print(old if v < (3, 11) else "" if find("venv") and find("ensurepip") else bare)
problem = $(shell '$(PYTHON)' -c '$(CHECK)' 2>/dev/null || \
	echo "it does not run; install Python 3.11 or newer, or choose one: make PYTHON=/path/to/python3")
check = $(if $(problem),$(error $(PYTHON) cannot be used: $(problem)))

pip_install = PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 \
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(1)/bin/python -m pip install -qq
unexport PYTHONHOME PYTHONPATH

.PHONY: help sweep test test-slow lint figures benchmark inference data clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile
	@echo 'PYTHON=python3.12 chooses the interpreter, EXTRAS=dev,cuda adds NVIDIA GPUs.'

sweep: .venv/stamp $(if $(filter -h --help --data-dir% mnist --dataset=mnist $(foreach kind,idx npz folder text tfds,$(kind):% --dataset=$(kind):%),$(ARGS)),,data) ## the pruning study, from data to figures; ARGS="--preset challenge --seeds 3"
	@.venv/bin/python experiments/sweep.py $(ARGS)

test: .venv/stamp data ## the tests but the slow ones; ARGS="-k masks"
	@.venv/bin/python -m pytest $(PARALLEL) $(ARGS)

test-slow: .venv/stamp data ## all tests
	@.venv/bin/python -m pytest $(PARALLEL) -m '' $(ARGS)

lint: .venv/stamp ## style and types
	@status=0; \
	.venv/bin/python -m ruff check || status=1; \
	.venv/bin/python -m ruff format --check || status=1; \
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 PYRIGHT_PYTHON_FORCE_VERSION= \
		.venv/bin/python -m pyright --pythonpath .venv/bin/python || status=1; \
	exit $$status

figures: .venv/stamp ## figures/ and its RESULTS.md anew, or from RUN=runs/fashion_mnist-challenge
	@.venv/bin/python experiments/figures.py $(RUN) --out figures $(ARGS)

benchmark: .venv/stamp .venv-torch/stamp data ## speed against PyTorch, in an environment of its own
	@torch=; [ ! -e .venv-torch/stamp ] || torch='--torch .venv-torch/bin/python'; \
	.venv/bin/python experiments/benchmark.py $$torch --out figures/benchmark.json $(ARGS)

inference: .venv/stamp .venv-torch/stamp data ## milliseconds and bytes of the networks of RUN=runs/fashion_mnist-quick
	@torch=; [ ! -e .venv-torch/stamp ] || torch='--torch .venv-torch/bin/python'; \
	.venv/bin/python experiments/inference_speed.py $$torch \
		$(if $(findstring quick,$(ARGS)),,--out figures/inference.json) \
		$(if $(filter file,$(origin RUN)),runs/fashion_mnist-quick,$(RUN)) $(ARGS)

data: .venv/stamp # where Debian has the data as a package; elsewhere the program gets it
	@sh experiments/get_debian_data.sh

clean: ## remove environments and caches; runs stay
	@rm -rf .venv .venv-torch .hypothesis .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -prune -exec rm -rf {} +

.venv/stamp: $(if $(FRESH),,FORCE)
	$(check)
	@echo 'creating .venv (about a minute)'
	@'$(PYTHON)' -m venv --clear .venv && $(call pip_install,.venv) -e '.[$(EXTRAS)]' || \
		{ rm -rf .venv; echo 'no .venv, for the reason above; the same command tries again' >&2; exit 1; }
	@echo '$(WANTED)' >$@

.venv-torch/stamp: .venv/stamp $(if $(FRESH_TORCH),,FORCE)
	$(check)
	@echo 'creating .venv-torch (PyTorch, some minutes)'
	@.venv/bin/python -m venv --clear .venv-torch && $(call pip_install,.venv-torch) numpy torch && \
		echo '$(WANTED_TORCH)' >$@ || \
		{ rm -rf .venv-torch; echo 'no PyTorch, for the reason above; going on without' >&2; }
