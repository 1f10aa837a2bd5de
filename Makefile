# Every target does its own set-up. RUN, BUILD and TRAIN shorten or move the demo; see README.
# BENCH holds further flags of the benchmark, such as --device=cuda.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Real data sets: a folder the user fills; beside this checkout there may already be one.
export DATA_ROOT ?= $(if $(wildcard ../shared/data),$(realpath ../shared/data),$(CURDIR)/data)
# Two ranks share the cores: without this every rank starts a thread a core and they fight.
ONE_THREAD := OMP_NUM_THREADS=1

RUN ?= runs/demo
BUILD ?=
TRAIN ?=
EVAL ?= --num_samples 200 --batch_size 128
REAL_RUN ?= runs/real_cpu
LIMIT ?= 200
MATRIX_RUN ?= runs/distill_matrix
QUICK_RUN ?= runs/distill_quick
GSM8K_RUN ?= runs/distill_gsm8k
MATRIX ?=
EXPERIMENTS_RUN ?= runs/experiments/quick
BENCH ?=
GPU_CHECK ?=

.PHONY: setup setup-gpu demo real experiments results distill-matrix distill-quick distill-gsm8k test test-slow check bench gpu-check test-gpu

# Ranks of these are CPU processes, also on a machine with GPUs.
demo real experiments distill-matrix distill-quick distill-gsm8k test test-slow: export DS_ACCELERATOR := cpu
demo real experiments distill-matrix distill-quick distill-gsm8k test test-slow: export CUDA_VISIBLE_DEVICES :=

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt requirements-lora.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet -r requirements.txt -r requirements-dev.txt -r requirements-lora.txt
	python -c "from pretrain.process_group import prepare_extensions; prepare_extensions()"
	touch $@

# Optional GPU backends, one by one; it continues where it was interrupted.
setup-gpu: setup
	python bench/gpu_setup.py

demo: setup
	rm -rf $(RUN)
	python data_pipeline/build.py --recipe data_pipeline/recipes/demo.yaml --out $(RUN)/data $(BUILD)
	$(ONE_THREAD) deepspeed --num_accelerators 2 pretrain/main.py --ds_config ds_configs/zero3_ep.json \
		--config pretrain/configs/demo.yaml output_dir=$(RUN) data.path=$(RUN)/data $(TRAIN)
	test -f $(RUN)/DONE
	python eval/causal_loop.py --checkpoint $(RUN)/export --output_path $(RUN)/eval --log_samples $(EVAL)
	python eval/report.py $(RUN) --out $(RUN)/report.html

real: setup
	python data_pipeline/build.py --recipe data_pipeline/recipes/real_cpu.yaml --out $(REAL_RUN)/data $(BUILD)
	$(ONE_THREAD) deepspeed --num_accelerators 2 pretrain/main.py --ds_config ds_configs/zero3_ep.json \
		--config pretrain/configs/real_cpu.yaml output_dir=$(REAL_RUN) data.path=$(REAL_RUN)/data $(TRAIN)
	test -f $(REAL_RUN)/DONE
	python eval/run.py --checkpoint $(REAL_RUN)/export --tasks gsm8k,logiqa,babi,arc --limit $(LIMIT) --num_fewshot 0 \
		--output_path $(REAL_RUN)/eval
	python eval/report.py $(REAL_RUN) --out $(REAL_RUN)/report.html

# The quick matrix of experiments/CLAIMS.md and the report over it; standard.yaml takes a working day.
experiments: setup
	python experiments/run.py --matrix quick --out $(EXPERIMENTS_RUN) --jobs 2
	python experiments/report.py --runs $(EXPERIMENTS_RUN) --out $(EXPERIMENTS_RUN)/RESULTS.md

# docs/RESULTS.md and the README's figure from the committed records of these matrices.
PUBLISHED := standard names examples iterations loss_weights
results: setup
	python experiments/report.py $(PUBLISHED:%=--runs experiments/results/%.jsonl) --out docs/RESULTS.md

# Latent chain of thought, every method and control: two hours on two cores. MATRIX holds further flags of
# experiments/run.py, such as --cells 'kava-*'.
distill-matrix: setup
	python experiments/run.py --matrix latent_cot --out $(MATRIX_RUN) --jobs 2 $(MATRIX)
	python eval/report.py $(MATRIX_RUN)/cells/*-[0-9] --out $(MATRIX_RUN)/report.html

# The same on GSM8K, from scratch: an hour and a half on two cores.
distill-gsm8k: setup
	python experiments/run.py --matrix latent_cot_gsm8k --out $(GSM8K_RUN) --jobs 2 $(MATRIX)
	python eval/report.py $(GSM8K_RUN)/cells/*-[0-9] --out $(GSM8K_RUN)/report.html

# Fewer methods and steps than distill-matrix: a quarter of an hour.
distill-quick: setup
	python experiments/run.py --matrix latent_cot_quick --out $(QUICK_RUN) --jobs 2 $(MATRIX)
	python eval/report.py $(QUICK_RUN)/cells/*-[0-9] --out $(QUICK_RUN)/report.html

# One more than cores, at most 4: tests wait for launchers, timeouts and each other's ranks.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0)) + 1))")

test: setup
	$(ONE_THREAD) python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: setup
	$(ONE_THREAD) python -m pytest -m slow

check: setup
	ruff check .
	ruff format --check .
	mypy

bench: setup
	python bench/compare.py --out runs/bench.json $(BENCH)
	$(ONE_THREAD) python bench/data.py --out runs/bench_data.json
	$(ONE_THREAD) python bench/evaluation.py --out runs/bench_evaluation.json

# Everything that only a GPU can show, in at most 8 minutes on one GPU; GPU_CHECK holds further flags, such as
# --device=cpu, which runs all but the CUDA kernels.
gpu-check: setup
	python bench/gpu_check.py $(GPU_CHECK)

# The tests of single backends, which need a GPU.
test-gpu: setup
	python -m pytest -m gpu
