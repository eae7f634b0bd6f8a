#!/usr/bin/env bash
# Checks and times vlm-fix on one GPU, in at most eight minutes and without a network: results/gpu.sh
#
# It needs a python3 with torch 2.11 or later, transformers 5.17 or later and what these bring (Triton, accelerate, Pillow);
# nothing is installed. Models have the shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B and random weights. results/bench/gpu.json has
# every step that ran, and under "left" those for which there was no time.
#
#   PYTHON=...                      another python3
#   results/gpu.sh --shapes tiny,tiny-qwen --widths 100 --new-tokens 4 --rounds 1     tries the script on a CPU
#   results/gpu.sh --seconds 200    stops earlier; LIMIT=1800 results/gpu.sh --seconds 1700 later
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/vlm_fix"
for part in vlm_fix/*; do ln -s "$PWD/$part" "$tree/vlm_fix/"; done
for part in methods eval demo; do ln -s "$PWD/$part" "$tree/vlm_fix/"; done # as the package is installed
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=6
"${PYTHON:-python3}" -c 'import rich' 2>/dev/null || echo "rich is missing: only the command line needs it"
timeout "${LIMIT:-480}" "${PYTHON:-python3}" -m vlm_fix.eval.bench.device "$@"
