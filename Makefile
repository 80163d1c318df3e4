# make chat   a terminal chat; MODEL=folder-or-hub-id DTYPE=bfloat16 DEVICE=cuda ARGS="--bits 4" as you like
# make web    the same in a browser, at http://127.0.0.1:7860
# make serve  a server for many at once, as OpenAI's clients expect it; MODEL, DTYPE, DEVICE and ARGS as for chat
# make test   format, lint, types of signatures and all tests
# make ladder the tests of every supported transformers version, and their table
# make ecosystem  the tests of LangChain, LlamaIndex, other libraries' quantizers, Ray Serve and DeepSpeed (700 MB)
# make canary every test of tests/ on the newest libraries that pip finds (PyTorch too: gigabytes; TORCH_INDEX=URL for another)
# make bench  speed of the full-size model (random weights, 28 GB in bench_data); ARGS="--layers 4" for a quick run
# make tiny   train the checkpoint in tiny/ again
# make clean  remove the environment and everything that was built
#
# Needs python3 (3.11 or newer) with its venv module, and make. Everything is installed into .venv. Without an NVIDIA
# driver PyTorch's CPU builds are taken; TORCH_INDEX=URL names another index of it, TORCH_INDEX=default pip's own.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= tiny
DTYPE ?=
DEVICE ?=
ARGS ?=
TORCH_INDEX ?=
TESTS ?= tests cpu/tests finetune/tests serving/tests

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUNTIME := $(VENV)/.runtime-installed
CHAT := $(VENV)/.chat-installed
SERVER := $(VENV)/.server-installed
WEB := $(VENV)/.web-installed
DEV := $(VENV)/.dev-installed

.PHONY: chat web serve test lint ladder ecosystem canary bench tiny clean
.DEFAULT_GOAL := chat

chat: $(CHAT)
	@exec $(BIN)/python cli_chat.py --model "$(MODEL)" $(if $(DTYPE),--dtype $(DTYPE)) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

serve: $(SERVER)
	@exec $(BIN)/python serving/api.py --model "$(MODEL)" $(if $(DTYPE),--dtype $(DTYPE)) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

web: $(WEB)
	@exec $(BIN)/python serving/web.py --model "$(MODEL)" $(if $(DTYPE),--dtype $(DTYPE)) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

test: lint
	HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$(abspath $(VENV))/modules" $(BIN)/python -m pytest $(TESTS)

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/nox -s signatures

ladder: $(DEV)
	$(BIN)/nox -s ladder

ecosystem: $(DEV)
	$(BIN)/nox -s ecosystem

canary: $(DEV)
	$(BIN)/nox -s canary -- $(ARGS)

bench: $(DEV)
	@$(PIP) matplotlib
	$(BIN)/python benchmarks/speed.py $(ARGS)

tiny: $(RUNTIME)
	$(BIN)/python train_tiny.py

clean:
	rm -rf $(VENV) .nox .pytest_cache .ruff_cache .hypothesis cpu/build cpu/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): requirements.txt cpu/pyproject.toml
	@$(PYTHON) install.py --venv "$(VENV)" --torch-index "$(TORCH_INDEX)"
	@touch $@

$(CHAT) $(WEB): $(VENV)/.%-installed: serving/requirements-%.txt $(RUNTIME)
	@$(PIP) -r $<
	@touch $@

$(SERVER): serving/requirements.txt $(RUNTIME)
	@$(PIP) -r $<
	@touch $@

$(DEV): requirements-dev.txt finetune/requirements.txt serving/requirements.txt $(RUNTIME)
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PIP) -r requirements-dev.txt
	@touch $@
