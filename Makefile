# make run · make test · make test-long · make test-browser · make lab · make train TASK=reverse · make evaluate · make sweep · make reproduce · make share   (each sets up .venv when it is missing or stale)
PYTHON ?= python3
TORCH ?= torch.txt
TASK ?= forward
# more parameters of the notebook, such as ARGS="-p num_epochs 2 -p overwrite true"
ARGS ?=
# tests of a file share what it makes, so they stay in one process
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
READY := .venv/ready-$(basename $(TORCH))

.PHONY: run train evaluate sweep reproduce share test test-long test-browser lint lab

run: $(READY)
	@$(BIN)/python -m mmrev_kit notebook train -p task forward $(ARGS)

train: $(READY)
	@$(BIN)/python -m mmrev_kit notebook train -p task $(TASK) $(ARGS)

evaluate: $(READY)
	@$(BIN)/python -m mmrev_kit notebook evaluate -p task $(TASK) $(ARGS)

sweep: $(READY)
	@$(BIN)/python -m mmrev_kit notebook sweep $(ARGS)

reproduce: $(READY)
	@$(BIN)/python -m mmrev_kit notebook reproduce $(ARGS)

share: $(READY)
	@$(BIN)/python -m mmrev_kit share $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-long: $(READY)
	@MMREV_LONG=1 $(BIN)/python -m pytest $(PARALLEL) -m long $(ARGS)

test-browser: $(READY)
	@$(BIN)/python -m pytest $(PARALLEL) -rs tests/browser $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify notebooks/*.ipynb

lab: $(READY)
	@$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks/index.ipynb $(ARGS)

$(READY): pyproject.toml constraints.txt $(TORCH)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	@echo "setting up .venv (several minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(TORCH) -c constraints.txt -e '.[dev]'
	@rm -f .venv/ready-* && touch $@
