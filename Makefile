# Everything starts from a clone: a virtual environment, what the project needs, and the command itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test

demo: .venv/demo
	$(BIN)/python -m dataset.demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv

.venv/demo: requirements.txt .venv/bin/python
	$(BIN)/pip install --quiet -r requirements.txt easy-vqa==1.0
	touch $@

.venv/dev: requirements.txt requirements-dev.txt .venv/bin/python
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@
