PYTHON ?= python3
RUN := .venv/bin/python

# Made again when what it installs changes; the stamp is written last, so a broken install is not taken for whole.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed, this is %d.%d; try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: install train serve evaluate test soak check format
install: .venv/installed

# Gemma 2, tiny, on a simulated v5p-16, on real text.
train: install
	$(RUN) -m launch.train model=tiny

# OpenAI's API and a chat page at http://127.0.0.1:8000, with what was trained last; trains `tiny` where nothing was.
serve: install
	ls runs/*/checkpoints/* > /dev/null 2>&1 || $(RUN) -m launch.train model=tiny
	$(RUN) -m launch.serve run=latest

# A small suite on shipped examples, of what was trained last; trains `tiny` where nothing was. Ends with a table and a page.
evaluate: install
	ls runs/*/checkpoints/* > /dev/null 2>&1 || $(RUN) -m launch.train model=tiny
	$(RUN) -m launch.evaluate run=latest suite=quick

test: install
	$(RUN) -m pytest

# What takes minutes: twenty random faults in one run, bit for bit.
soak: install
	$(RUN) -m pytest -m soak

check: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
