# Each verb sets up all it needs: a virtual environment in .venv with the versions of constraints.txt.
# On a machine with an NVIDIA GPU: see "On your own GPU" in README.md.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# PyPI's torch for Linux brings several GB of CUDA libraries. Without a GPU a CPU build does:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BENCHMARKS := quickstart exports learning_rate pick_rate full_finetune plans floor plan_time ledger quality step load merge requantize export_memory attention packing rows growth
EXPERIMENTS := adapters capacity kinds rate layers batch embedding quantised flops masters larger_rate larger classes continual data rows methods

.PHONY: help quickstart test setup lint types slow check extras long llamacpp gpu bench regret format clean

help:  ## list these verbs
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

quickstart: $(STAMP)  ## train, score, export and look at a QLoRA adapter: no GPU, no downloads but the packages
	@$(BIN)/qlora-kit train quickstart --overwrite
	@echo
	@echo 'merging the adapter into plain weights, and comparing them with the model as trained ...'
	@rm -rf runs/quickstart/merged
	@$(BIN)/qlora-kit export runs/quickstart --to merged --out runs/quickstart/merged
	@echo
	@echo 'Next, a 7B model on a GPU of 8 GB or more, with your own chats:'
	@echo '  $(BIN)/qlora-kit plan  qlora-7b-8gb data.train=chats.jsonl'
	@echo '  $(BIN)/qlora-kit train qlora-7b-8gb data.train=chats.jsonl'

test: $(STAMP)  ## the default tests, at most 5 minutes on two cores
	@$(BIN)/python -m pytest -n 2 --dist worksteal

setup: $(STAMP)  ## the virtual environment alone

lint: $(STAMP)  ## ruff: lint and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy on the package
	@$(BIN)/mypy

slow: $(STAMP)  ## the tests that are too long for the default run
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu'

check: lint types  ## all that continuous integration runs: lint, types, the default tests and the slow ones
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not long and not gpu'

extras: $(STAMP)  ## install the extras `tracking` and `eval` (a minute), and run what needs them: trackers, lm-eval
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,tracking,eval]'
	@$(BIN)/python -m pytest -n 2 tests/test_trackers.py tests/test_lm_eval.py -m 'not gpu' -rs

llamacpp: $(STAMP)  ## build llama.cpp (6 to 15 minutes, once; needs cmake and a C++ compiler), and let it read exports
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt llama-cpp-python==0.3.36
	@$(BIN)/python -m pytest tests/test_llamacpp.py -m slow -rs

long: $(STAMP)  ## the tests that are too long for continuous integration too
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'long and not gpu'

gpu: $(STAMP)  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu -rs

bench: $(STAMP)  ## the benchmarks (an hour and a half on two cores); rows go to benchmarks/results/
	@for each in $(BENCHMARKS); do $(BIN)/python benchmarks/$$each.py; done

regret: $(STAMP)  ## the experiments of docs/without-regret.md (three hours on two cores)
	@$(BIN)/python benchmarks/regret/common.py
	@for NAME in $(EXPERIMENTS); do echo "$$NAME ..."; $(BIN)/python "benchmarks/regret/$$NAME.py" || exit 1; done
	@$(BIN)/python benchmarks/regret/draw.py
	@$(BIN)/python -m pytest tests/test_findings.py

format: $(STAMP)  ## put the code in shape
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and the runs
	rm -rf .venv runs

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing the pinned packages into .venv (once; 1 to 3 minutes) ...'
	@$(BIN)/python -m pip install --quiet torch==2.13.0 --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
