# The commands a person types. `make` alone lists them; docs/ has a page for each subject.

VENV  ?= .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# The first of these that is a supported Python; PYTHON=... names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
# torch's own range, for an install from TORCH_INDEX (another build of the same releases).
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)

# An index named by hand is installed from again when it is not the one that the environment came from.
ifdef TORCH_INDEX
ifneq ($(TORCH_INDEX),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install demo demo-translate test test-browser test-router test-vllm test-clients test-dashboard lint format bench-char bench-train bench-multi30k bench-architectures bench-positions bench-reverse bench-step-time bench-kernels bench-translate bench-start bench-serve bench-gpu-serve bench-checkpoint bench-kill bench-sampling bench-streams fuzz figures clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install everything (TORCH_INDEX=URL for another torch build)

$(STAMP): pyproject.toml setup.py $(wildcard serve/engine/kernels/*.[ch])
	@test -n "$(PYTHON)" || { echo "Heed needs Python 3.11, 3.12 or 3.13, and none is on the PATH: install one, or name it with PYTHON=/path/to/python3."; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 || { rm -rf $(VENV); \
		echo "$(PYTHON) could not make a virtual environment: install its venv module (Debian: apt install python3-venv). It said: $$(tail -n 1 $(VENV).log)"; exit 2; }
	@rm -f $(VENV).log
ifdef TORCH_INDEX
	$(PY) -m pip install --index-url "$(TORCH_INDEX)" --force-reinstall --no-deps "$(TORCH)"
endif
	$(PY) -m pip install -e '.[dev]'
	@echo "$(TORCH_INDEX)" >$@

demo: $(STAMP) ## train a small language model on Shakespeare, serve it, talk to it (ONCE=1 ends there, TEXT=FILE uses your text)
	@$(PY) scripts/demo.py $(if $(ONCE),--once) $(if $(TEXT),--text "$(TEXT)")

demo-translate: $(STAMP) ## RNNsearch and the 2017 Transformer learn to reverse, translate, show their attention (ONCE=1 ends there)
	@$(PY) scripts/demo_translate.py $(if $(ONCE),--once)

test: $(STAMP) ## run all tests
	@$(PY) scripts/fetch.py smollm2 || echo "The tests that need this model are skipped."
	$(PY) -m pytest

test-browser: $(STAMP) ## run the tests of the pages in a real browser (Debian: apt install chromium chromium-driver)
	$(PY) -m pytest tests/browser

test-dashboard: $(STAMP) ## ask a real Prometheus all that the Grafana dashboard asks (Debian's package, fetched by apt)
	@command -v prometheus >/dev/null || test -x .cache/prometheus/usr/bin/prometheus || { mkdir -p .cache/prometheus && \
		cd .cache/prometheus && apt-get -qq download prometheus && dpkg-deb -x prometheus_*.deb .; } || \
		echo "There is no Prometheus, and apt cannot fetch one: its part is skipped."
	$(PY) -m pytest tests/serve/api/test_dashboard.py

test-router: $(STAMP) ## deploy/: the router under a real nginx (Debian's package, fetched by apt), the manifests by their schema
	@command -v nginx >/dev/null || test -x .cache/nginx/usr/sbin/nginx || { mkdir -p .cache/nginx && \
		cd .cache/nginx && apt-get -qq download nginx && dpkg-deb -x nginx_*.deb .; } || \
		echo "There is no nginx, and apt cannot fetch one: its part is skipped."
	$(PY) -m pytest tests/deploy

test-vllm: $(STAMP) ## the conformance suite: the same requests to real vLLM, in an environment that it makes (ONLY='chat/*' for some)
	@$(PY) scripts/fetch.py smollm2
	$(PY) -m pytest tests/conformance -s -o timeout=1800 --durations=0 $(if $(ONLY),--only "$(ONLY)")
	$(if $(ONLY),,$(PY) -m pytest tests/on_vllm)

# What `make test-clients` installs for itself; torch from TORCH_INDEX, as with `make install`.
CLIENTS := .cache/clients

$(CLIENTS)/.installed: tests/clients/requirements.txt
	rm -rf $(CLIENTS)
	$(PYTHON) -m venv $(CLIENTS)
ifdef TORCH_INDEX
	$(CLIENTS)/bin/python -m pip install -q --index-url "$(TORCH_INDEX)" "$(TORCH)"
endif
	$(CLIENTS)/bin/python -m pip install -q -r tests/clients/requirements.txt
	@touch $@

test-clients: $(STAMP) $(CLIENTS)/.installed ## the clients that others wrote, in an environment of their own: openai, litellm, LangChain, lm-eval, ...
	HEED_PYTHON=$(abspath $(PY)) $(CLIENTS)/bin/python -m pytest tests/clients

lint: $(STAMP) ## ruff and the type checker
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## let ruff put the source in form
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-char: $(STAMP) ## loss on Tiny Shakespeare by characters, beside nanoGPT (NANOGPT=DIR, a clone of it)
	$(PY) -m bench.char

bench-train: $(STAMP) ## training speed beside transformers.Trainer
	$(PY) -m bench.train

bench-multi30k: $(STAMP) ## BLEU on Multi30k (HEED_MULTI30K=DIR, the data set; trains for hours)
	$(PY) -m bench.multi30k

bench-architectures: $(STAMP) ## RNNencdec, RNNsearch, Transformer, causal and prefix LM side by side (HEED_MULTI30K=DIR; hours)
	$(PY) -m bench.architectures

bench-positions: $(STAMP) ## the Transformer with learned positions and with none, beside sinusoids (HEED_MULTI30K=DIR; hours)
	$(PY) -m bench.architectures --positions

bench-reverse: $(STAMP) ## reversal: exact outputs and true alignments of RNNsearch and the Transformer
	$(PY) -m bench.reverse

bench-step-time: $(STAMP) ## the time of a training step against sentence length
	$(PY) -m bench.step_time

bench-kernels: $(STAMP) ## attention over the paged cache beside torch's fused attention
	$(PY) -m bench.kernels

bench-translate: $(STAMP) ## decoding speed beside transformers and CTranslate2 (QUICK=1: whether it runs)
	$(PY) -m bench.translate_speed

bench-start: $(STAMP) ## seconds from `python -m serve` to the first token
	$(PY) -m bench.start

bench-gpu-serve: $(STAMP) ## on a GPU: the engine beside transformers' continuous batching and the memory's limit (unverified)
	$(PY) -m bench.gpu_serve

bench-serve: $(STAMP) ## serving beside vLLM-CPU and llama.cpp (QUICK=1: one model, a quarter of an hour)
	$(PY) -m bench.serve

bench-checkpoint: $(STAMP) ## what a checkpoint a minute costs a model of 100M parameters
	$(PY) -m bench.checkpoint

bench-kill: $(STAMP) ## a run killed at 20 random moments, beside the one never killed
	$(PY) -m bench.kill

bench-sampling: $(STAMP) ## what mixed sampling adds to a step beside all-greedy, a batch of 64
	$(PY) -m bench.sampling

bench-streams: $(STAMP) ## 500 streams at once for ten minutes: none lost, none wrong, memory flat (QUICK=1: one minute)
	$(PY) -m bench.streams

fuzz: $(STAMP) ## 20,000 calls of what anybody may send, on a tiny model: no 500, none without an answer
	$(PY) -m bench.fuzz

figures: $(STAMP) ## write the figures in README.md and docs/ anew from bench/results/
	$(PY) scripts/figures.py

clean: ## remove what was built and cached (runs/ and .venv stay; the next command installs what it needs again)
	rm -rf $(STAMP) build dist *.egg-info serve/engine/kernels/*.so .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
