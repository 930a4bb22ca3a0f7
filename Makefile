# make study and make test set up all they need; a second run installs nothing.
SHELL := /bin/bash
STUDY ?= miniature
PROFILE ?= local
# what the caller says reaches the commands as it is, whatever signs are in it: no shell and no make reads it
override STUDY := $(value STUDY)
override PROFILE := $(value PROFILE)
override DEVICE := $(value DEVICE)
override PRICE := $(value PRICE)
export STUDY PROFILE DEVICE PRICE
AUDIT := PROBES ADAPTER ADAPTERS MODEL ENDPOINT BASE JUDGE BENCHMARKS BUDGET MARGIN SYSTEM FAIL_IF SINCE TEMPLATE BASE_LOG CANDIDATE_LOG METRIC CLUSTER STRATUM BETTER WITH VALUE ALIGNED UNALIGNED
$(foreach name,$(AUDIT),$(eval override $(name) := $$(value $(name))))
export $(AUDIT)
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3 python,$(shell command -v $(name) >/dev/null 2>&1 && \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(name))))
# relative, since a target of make may hold no space; the tools are run as modules, since a script's first line cannot hold every path
PY := .venv/bin/python
READY := .venv/.installed
# real public data for studies/real_data.yaml and the tests: where this folder is there, it is used instead of a download
ifndef DRIFTBOOK_SHARED
ifneq ($(wildcard ../shared),)
export DRIFTBOOK_SHARED := $(CURDIR)/../shared
endif
endif
export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(CURDIR)/.venv/bin:$(PATH)
.DEFAULT_GOAL := help
LINT_IMPORTS := $(PY) -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'
CHECK := $(PY) -m ruff format --check --quiet . && $(PY) -m ruff check --quiet . && $(LINT_IMPORTS) --no-cache
.PHONY: help study status audit repair plan calibrate check test test-slurm bench report reread export figures publish lab lint purge

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "driftbook needs Python 3.11 or newer; install it, or say make PYTHON=/path/to/python"; exit 1; }
	@test -x $(PY) || "$(PYTHON)" -m venv .venv
	@echo "installing the packages of requirements.txt into .venv (once)"
	@if command -v uv >/dev/null 2>&1; then \
		export UV_FIND_LINKS="$$($(PY) -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS)"; \
		export UV_EXTRA_INDEX_URL="$$($(PY) -m pip config get global.extra-index-url 2>/dev/null || echo $$PIP_EXTRA_INDEX_URL)"; \
		uv pip install --quiet --python $(PY) --index-strategy unsafe-best-match -r requirements.txt -e .; \
	else \
		$(PY) -m pip install -qq --disable-pip-version-check -r requirements.txt -e .; \
	fi
	@git config diff.ipynb.textconv "$(PY) -m jupytext --to py:percent --output - --from ipynb" 2>/dev/null || true
	@touch $@

study: $(READY) ## run a study from training to report; STUDY=miniature, or a file
	@$(PY) -m driftbook.batch.make_study "$$STUDY" "$$PROFILE"

audit: $(READY) ## what an adapter did to its base model; ADAPTER=folder or OWNER/NAME@COMMIT, BUDGET="10 minutes" or all, FAIL_IF="safety<-3"; see notebook 21
	@$(PY) -W ignore -m driftbook.publishing.make_audit

repair: $(READY) ## a repaired copy of an adapter, audited before and after; ADAPTER=... WITH=rescale or safe_lora
	@$(PY) -W ignore -m driftbook.publishing.make_repair

status: $(READY) ## how far a study is, while it runs or after; STUDY=...
	@$(PY) -W ignore -m driftbook.batch.make_status "$$STUDY"

plan: $(READY) ## say what a study needs: variants, hours, money, memory, disk, access; STUDY=... PROFILE=... PRICE=2.5 DEVICE=L40S
	@$(PY) -W ignore -m driftbook.batch.make_plan "$$STUDY" "$$DEVICE" "$$PRICE" "$$PROFILE"

calibrate: $(READY) ## measure this machine for make plan of a STUDY again (it does so once by itself); under a minute
	@HF_HUB_OFFLINE=1 $(PY) -W ignore -m driftbook.batch.calibrating "$$STUDY"

test: $(READY) ## run all checks and tests
	@$(CHECK) && $(PY) -m pytest

check: $(READY) ## in 90 seconds, for work in progress: format, lint, imports, hygiene and the fast laws
	@$(CHECK) && $(PY) -m pytest -m "not slow"

test-slurm: $(READY) ## run a study on a Slurm cluster of two nodes, started on this machine; needs root and Debian's packages; ONLY=words of a test's name
	@trap 'tests/slurm/cluster.sh stop' EXIT; tests/slurm/cluster.sh start && $(PY) -m pytest -n 0 -m slurm -k "$${ONLY:-test}" tests/test_slurm.py

bench: $(READY) ## measure scoring against lm-evaluation-harness and our goals; writes outputs/bench
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PY) -W ignore -m bench

export: $(READY) ## write a finished study as lm-evaluation-harness results and inspect_ai logs
	@$(PY) -m driftbook.publishing.export "$$STUDY"

report: $(READY) ## write report.html of a finished study again
	@$(PY) -m driftbook.publishing.report "$$STUDY"

reread: $(READY) ## analyse what others published again (notebooks 20, 22, 23 and 24)
	@for pair in 20_original_study:original_study 22_peft_results:peft_results 23_adaptation_study:adaptation_study 24_original_claims:original_study; do \
		name=$${pair%:*}; made=outputs/$${pair#*:}; \
		$(PY) -m driftbook.batch.warm notebook notebooks/$$name.ipynb $$made/$$name.ipynb '{}' 2>/dev/null \
			&& echo "analysed again: $$made by notebook $$name" || { cat $$made/$$name.error.txt; exit 1; }; done

publish: $(READY) ## copy a finished study's text-free tables and figures to outputs/published
	@$(PY) -m driftbook.publishing.publish "$$STUDY"

figures: $(READY) ## redraw every published figure from the committed tables
	@$(PY) -m driftbook.batch.warm notebook notebooks/18_figures.ipynb outputs/figures.ipynb '{}' 2>/dev/null \
		&& echo "redrawn: outputs/published/*/figures" || { cat outputs/figures.error.txt; exit 1; }

lab: $(READY) ## open JupyterLab with the notebooks
	@$(PY) -m jupyterlab notebooks

lint: $(READY) ## check style and strip the notebooks' outputs
	@$(PY) -m ruff check . && $(PY) -m nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb

purge: $(READY) ## delete every copy of what models said in a study; of an audit STUDY=outputs/audit/NAME
	@$(PY) -m driftbook.batch.purging "$$STUDY"
