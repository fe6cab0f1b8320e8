# Everything a fresh machine needs: Python 3.11 or newer, and this file. Each target sets itself up.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= demo/smollm2-135m-w4a16-gptq

.DEFAULT_GOAL := help
.PHONY: help demo test expectations check labs bench bench-deploy bench-prune bench-distill bench-scale clean

help:
	@echo "make demo    compress SmolLM2-135M to 4 bits, measure it, write a report (a few minutes)"
	@echo "make test    all tests (about 13 minutes on two cores)"
	@echo "make expectations  every shipped recipe on SmolLM2-135M, within its band (about half an hour)"
	@echo "make labs    every lab: its grader proven, its notebook executed, its expectations checked (offline)"
	@echo "make check   lint, types, formatting"
	@echo "make bench   time and quality against llm-compressor, in an environment of its own"
	@echo "make bench-deploy  exports, encoders and decoding in each runtime, a stopwatch; keep the machine quiet"
	@echo "make bench-prune   masks, solves and cuts against published routines and Torch-Pruning, MiniLM at half, a latency that was asked for"
	@echo "make bench-distill every loss, students beside what they learn without a teacher (over an hour); keep the machine quiet"
	@echo "make bench-scale   Llama-2-7B's shapes on this machine, costs over four sizes, runs that are killed (an hour, 40 GB of disk)"

# torch goes first and alone, pinned, so that pip takes the plain CPU build; bring your own with VENV=... if you have a GPU.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('CompressLab needs Python 3.11 or newer: set PYTHON=...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m compresslab.warm
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/compresslab compress smollm2-135m --recipe w4a16-gptq --data wiki --out $(DEMO) --force
	@echo; echo "The same artifact, opened again by plain transformers in a new process:"
	$(BIN)/compresslab evaluate $(DEMO) --data wiki

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

expectations: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m expectations

check: $(VENV)/.ready
	$(BIN)/ruff check src tests benchmarks theory
	$(BIN)/ruff format --check src tests benchmarks theory
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

labs: $(VENV)/.ready
	$(BIN)/compresslab lab verify --jobs 2

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/bench.py

# The runtimes are extras: pip install -c constraints.txt -e ".[gguf,onnx,genai,openvino,executorch,llama-cpp]" first.
DEPLOY ?= bench-deploy-out
bench-deploy: $(VENV)/.ready
	mkdir -p $(DEPLOY)
	test -d $(DEPLOY)/w4a16-gptq || $(BIN)/compresslab compress smollm2-135m --out $(DEPLOY)/w4a16-gptq
	$(BIN)/python benchmarks/exporting.py $(DEPLOY)/w4a16-gptq --out results/exports-smollm2.json
	test -d $(DEPLOY)/w4a16-rtn-symmetric || $(BIN)/compresslab compress smollm2-135m --recipe w4a16-rtn --set symmetric=true \
		--no-measure --out $(DEPLOY)/w4a16-rtn-symmetric
	$(BIN)/python benchmarks/exporting.py $(DEPLOY)/w4a16-rtn-symmetric --formats executorch --add --out results/exports-smollm2.json
	$(BIN)/python benchmarks/encoder_latency.py --work $(DEPLOY)/encoder --out results/encoder-latency-minilm.json
	$(BIN)/python benchmarks/decoding.py $(DEPLOY)/w4a16-gptq --work $(DEPLOY)/decoding --out results/decoding-smollm2.json
	$(BIN)/python benchmarks/stopwatch.py smollm2-135m minilm-l6 --out results/stopwatch.json

# benchmarks/structured.py has parts on CIFAR-10 besides, which needs the pictures.
bench-prune: $(VENV)/.ready
	$(BIN)/python benchmarks/pruning_speed.py
	$(BIN)/python benchmarks/structured.py --only grouping minilm --out results/structured.json
	$(BIN)/python benchmarks/latency_target.py
	$(BIN)/compresslab peers install torch-pruning
	$(BIN)/python benchmarks/structured_peer.py

# 13.5 GB of random weights stay in $(SCALE) for the next time.
SCALE ?= bench-scale-out
bench-scale: $(VENV)/.ready
	$(BIN)/python benchmarks/scale.py --work $(SCALE) --out results/scale.json

# SST2=FOLDER and CIFAR10=FILE.parquet add the parts that need them.
TAUGHT ?= bench-distill-out
bench-distill: $(VENV)/.ready
	$(BIN)/compresslab peers install trl
	$(BIN)/python benchmarks/distill_loss.py
	$(BIN)/python benchmarks/distillation.py --work $(TAUGHT) --out results/distillation.json \
		$(if $(SST2),--sst2 $(SST2)) $(if $(CIFAR10),--cifar10 $(CIFAR10))

clean:
	rm -rf $(VENV) .peers demo labs-out $(DEPLOY) $(SCALE) $(TAUGHT)
