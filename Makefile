# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Ranks of one machine share its cores; a test that wants threads asks for them.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test soak check generate page verify clean
.PHONY: bench bench-train bench-gpu bench-recompute bench-bases bench-retention bench-data bench-plan bench-operator bench-checkpoint
SOAK := $(addprefix tests/test_,faults.py crashes.py two_operators.py fuzz.py chart.py training_faults.py \
	resume.py)


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

soak: $(VENV)/.dev       ## faults, crashes, two operators and random input at full length
	OSFT_SOAK=1 $(BIN)/python -m pytest -s $(SOAK)
	OSFT_SOAK=1 $(BIN)/python -m pytest -m hypothesis

check: $(VENV)/.dev      ## style, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

generate: $(VENV)/.dev   ## CRD, the chart's copy of it, the chart's defaults, README tables
	$(BIN)/python -m osft_operator.crd
	$(BIN)/python tests/chart_defaults.py
	$(BIN)/python tests/readme_tables.py

page: $(VENV)/.dev       ## what commands print, on the page for who runs the operator
	OSFT_WRITE_PAGE=1 $(BIN)/python -m pytest tests/test_end_to_end_page.py tests/test_chart_install.py

verify: generate         ## what is committed is what is generated
	git diff --exit-code

bench-retention: $(VENV)/.dev ## what methods keep of the old while they learn the new (ARGS=--quick)
	$(BIN)/python tests/bench/retention.py $(ARGS)

bench: bench-train

bench-train: $(VENV)/.dev ## a training step beside plain fine-tuning, PEFT's OSF and LoRA (ARGS=--quick)
	PYTHONPATH=tests $(BIN)/python -m bench.train_step $(ARGS)

bench-gpu: $(VENV)/.dev  ## the same on CUDA, with mini_trainer where it is installed
	PYTHONPATH=tests $(BIN)/python -m bench.train_step --device cuda --shape qwen2.5-1.5b \
		--turn-minutes 5 $(ARGS)
	PYTHONPATH=tests $(BIN)/python -m bench.train_step --device cuda --shape llama-3.1-8b \
		--turn-minutes 5 --random-bases $(ARGS)

bench-recompute: $(VENV)/.dev ## keeping, recomputing and compiling a block: time and memory
	PYTHONPATH=tests $(BIN)/python -m bench.recompute $(ARGS)

bench-bases: $(VENV)/.dev ## the split beside a singular value decomposition, and its cache
	PYTHONPATH=tests $(BIN)/python -m bench.decomposition $(ARGS)

bench-data: $(VENV)/.dev ## packing and collation, and preparing a large file (ARGS='2000 --kind json')
	PYTHONPATH=tests $(BIN)/python -m bench.packing
	PYTHONPATH=tests $(BIN)/python -m bench.prepare_data $(ARGS)

bench-plan: $(VENV)/.dev ## the memory that `osft plan` foretells beside what a training takes
	PYTHONPATH=tests $(BIN)/python -m bench.plan_memory $(ARGS)

JOBS ?= 1000
RUNNING ?= 500
bench-operator: $(VENV)/.dev   ## JOBS OSFTJobs on a real API server, beside a plain kopf operator
	$(BIN)/python tests/bench/operator_load.py --jobs $(JOBS) \
		--running $(RUNNING) --output tests/bench/results/operator-load-$(JOBS).json $(ARGS)

bench-checkpoint: $(VENV)/.dev ## how long a step waits for a save, beside how long the save takes
	PYTHONPATH=tests $(BIN)/python -m bench.checkpoint $(ARGS)

clean:
	rm -rf $(VENV) .demo
