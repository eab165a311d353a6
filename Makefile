# Everything starts from a clone: a virtual environment, what the project needs, and the command itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench storm figures

demo: .venv/demo
	$(BIN)/python -m dataset.demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The long proofs that nothing is lost: hundreds of kills, then changes of the number of processes.
KILLS ?= 500
storm: .venv/dev
	$(BIN)/python -m tests.storm --processes 1,2,3 --kills $$(( ($(KILLS) + 4) / 5 ))
	$(BIN)/python -m tests.storm --kills $(KILLS)

bench: .venv/dev
	$(BIN)/python -m benchmarks --json out/benchmark.json

# The README's plots, from what the demo leaves. Its diagrams are docs/figures/*.svg, the image of the page has a command of its own.
figures: .venv/dev
	for plot in loss attention; do $(BIN)/python -m docs.figures $$plot || exit 2; done

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv

.venv/demo: requirements.txt .venv/bin/python
	$(BIN)/pip install --quiet -r requirements.txt easy-vqa==1.0
	touch $@

.venv/dev: requirements.txt requirements-dev.txt requirements-video.txt .venv/bin/python
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@
