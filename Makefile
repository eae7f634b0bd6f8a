# `make run` and `make test` need nothing but Python 3.11 or 3.12; they create .venv themselves.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in [(3,11),(3,12)])' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
LIMIT ?= 300

.PHONY: run test test-lmms lint imports types docs leaderboard reproduce-picto clean

run: .venv/run  ## baseline and five methods on the bundled model: POPE x 3 and CHAIR, table and figure
	$(BIN)/vlm-fix eval all --model picto-llava --data picto:shift --method var,vhr,pai,vcd,hiprune \
	  --limit $(LIMIT) --batch-size 32 --seed 0 --variant pattern --output runs/picto-shift --resume

test: .venv/dev
	$(BIN)/python -m pytest

test-lmms: .venv-lmms/ready  ## lmms-eval itself, on the bundled model
	.venv-lmms/bin/python -m pytest tests/eval/harness/test_lmms.py

lint: .venv/dev imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

imports: build/typed  ## which part may import which, see [tool.importlinter] in pyproject.toml
	cd build/typed && ../../$(BIN)/lint-imports --no-cache ../../pyproject.toml

types: build/typed
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vlm_fix

.PHONY: build/typed
build/typed: .venv/dev  ## the package as installed: the folders of the repository have other import names
	rm -rf build/typed && $(BIN)/pip install -q --no-deps --no-build-isolation --target build/typed .

docs: .venv/run  ## docs/methods.md from the classes and results/, and the pruning curves
	$(BIN)/python -m vlm_fix.eval.methods_page docs/methods.md
	$(BIN)/python -m vlm_fix.eval.curves results/pruning docs/pruning.md

leaderboard: .venv/run  ## the tables of README and docs/leaderboard.md from the JSON in results/
	$(BIN)/vlm-fix report $(sort $(dir $(wildcard results/*/results.json))) --markdown docs/leaderboard.md
	$(BIN)/vlm-fix report results/picto-shift --markdown README.md

reproduce-picto: .venv/run  ## train picto-llava again (about 45 minutes on two cores)
	$(BIN)/vlm-fix picto train --seed 0 --out runs/picto-llava

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "vlm-fix needs Python 3.11 or 3.12; set PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[eval]'
	@touch $@

.venv/dev: .venv/run
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# .venv and what lmms-eval imports on its way to a LLaVA, without the rest of its fifty requirements
.venv-lmms/ready: .venv/dev tests/eval/harness/lmms.txt
	rm -rf .venv-lmms
	$(BIN)/python -m venv .venv-lmms
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(.venv-lmms/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	.venv-lmms/bin/pip install -q --no-deps -r tests/eval/harness/lmms.txt
	@touch $@

clean:
	rm -rf .venv .venv-lmms build runs *.egg-info
