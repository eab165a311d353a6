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

# The README's plots, from what the demo leaves, and its diagrams, by Chromium from docs/figures/*.svg. The image of the page has
# a command of its own: python -m tests.screenshot
figures: .venv/dev
	for plot in loss attention; do $(BIN)/python -m docs.figures $$plot || exit 2; done
	for name in structure sample; do chromium --headless --no-sandbox --hide-scrollbars --force-device-scale-factor=1.8 \
		--window-size=1000,832 --screenshot=images/$$name.png docs/figures/$$name.svg || exit 2; done

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv

.venv/demo: requirements.txt .venv/bin/python
	@echo 'Installing into .venv; torch is the largest package'
	$(BIN)/pip install -r requirements.txt easy-vqa==1.0
	touch $@

.venv/dev: requirements.txt requirements-dev.txt requirements-video.txt .venv/bin/python
	$(BIN)/pip install -r requirements.txt -r requirements-dev.txt
	touch $@
