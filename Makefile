# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Ranks of one machine share its cores; a test that wants threads asks for them.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check generate verify bench bench-retention soak bench-checkpoint clean

$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[operator,trainer]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[operator,trainer,dev]'
	touch $@

demo: $(VENV)/.run       ## teach a small model a second skill, compare with plain fine-tuning
	$(BIN)/python examples/demo/demo.py

test: $(VENV)/.dev       ## everything, with a real control plane (built once, then cached)
	-$(BIN)/python tests/cluster/binaries.py
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

soak: $(VENV)/.dev       ## fifty kills of random ranks at random moments, and every other fault
	OSFT_SOAK=50 $(BIN)/python -m pytest tests/test_faults.py

check: $(VENV)/.dev      ## style, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

generate: $(VENV)/.dev   ## CRD, the chart's copy of it, README tables
	$(BIN)/python -m osft_operator.crd
	$(BIN)/python tests/readme_tables.py

verify: generate         ## what is committed is what is generated
	git diff --exit-code

bench-retention: $(VENV)/.dev ## what methods keep of the old while they learn the new (ARGS=--quick)
	$(BIN)/python tests/bench/retention.py $(ARGS)

bench: $(VENV)/.dev      ## step time beside plain fine-tuning and PEFT's OSF
	$(BIN)/python tests/bench/train_step.py

bench-checkpoint: $(VENV)/.dev   ## how long a step waits for a save, beside how long the save takes
	$(BIN)/python tests/bench/checkpoint.py

clean:
	rm -rf $(VENV) .demo
