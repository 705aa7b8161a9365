# Needs python3 (3.10 or later), pip and make; everything else goes into .venv/, and is made once.
#   make demo    compress the bundled model by half, and report what that cost it           make lint    ruff and mypy
#   make test    the tests                                                                 make clean   what was made
#   make test-all   the tests on every family of models that transformers has; takes longer

PYTHON ?= python3
# torch is a step of its own: as a mere dependency it comes with gigabytes of GPU packages, also where there is no GPU.
# On such a machine give the CPU build, which pip takes by path or address: make TORCH=torch-2.13.0+cpu-....whl
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python -m
# Nothing here may need the network; and models this small are slower with more than one thread a process, much slower
# where other programs want the cores, too. MKL gives the same bits for the same numbers wherever they lie in memory only
# if it is told to, and wider vectors than these leave some numbers to other code at the ends of rows; the tests compare
# bits.
SMALL := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1
TEST := $(SMALL) MKL_CBWR=AVX2,STRICT ATEN_CPU_CAPABILITY=avx2 $(RUN) pytest -n $(JOBS) --dist worksteal

DEMO := examples/demo
OUT := out/demo

.PHONY: demo test test-all lint clean setup
.DEFAULT_GOAL := demo

demo: setup
	rm -rf $(OUT)
	$(SMALL) $(VENV)/bin/understudy compress $(DEMO)/model --method mone --ratio 0.5 \
		--data '$(DEMO)/train/*.jsonl.xz' --out $(OUT)
	$(SMALL) $(VENV)/bin/understudy eval $(OUT) --against $(DEMO)/model --data '$(DEMO)/test/*.jsonl.xz' \
		--tasks demo_math_arith,demo_drama_order --include-path $(DEMO)/tasks
	$(SMALL) $(VENV)/bin/understudy report $(OUT)

test: setup
	$(TEST) -m "not families" tests

test-all: setup
	$(TEST) tests

lint: setup
	$(RUN) ruff check src tests benchmarks examples
	$(RUN) mypy

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -type d -exec rm -rf {} +

setup: $(VENV)/.installed

# Debian splits off the part of Python that puts pip into a new environment (python3-venv), and its pip refuses to
# install outside of one. Without that part the environment starts empty, and the system's pip fills it by folder.
$(VENV)/.made:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || ( \
		rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip install --quiet --target \
			"$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip )
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(RUN) pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(RUN) pip install --quiet -e ".[dev,data,eval,report]"
	touch $@
