#!/usr/bin/env bash
# Makes every file of this folder again: results/reproduce.sh [FOLDER...]. About an hour on two cores; give one FOLDER alone
# to bench on an idle machine. VLM_FIX names another vlm-fix.
set -euo pipefail
cd "$(dirname "$0")/.."
vlm_fix=${VLM_FIX:-.venv/bin/vlm-fix}

evaluate() { # FOLDER ARGUMENT...
  "$vlm_fix" eval all --model picto-llava --data picto:shift --seed 0 --variant pattern --output "runs/$1" --resume "${@:2}"
  cp "runs/$1/results.json" "runs/$1/table.md" "results/$1/"
}

picto-shift() { # what `make run` runs
  evaluate picto-shift --method var,vhr,pai,vcd,hiprune --limit 300 --batch-size 32
  cp runs/picto-shift/figure.png docs/images/picto-shift.png
}

attention() {
  evaluate attention --limit 150 --batch-size 64 \
    --method act,ad_hh,avar,cca,gift,hgai,locore,pai,paint,tame,vaf,var,zerotuning,spin,vhr,iri,head_pursuit
}

decoding() {
  evaluate decoding --limit 150 --batch-size 64 --controls \
    --method vcd,icd,m3id,sid,decore,iava,causalmm,layercake,pai:gamma=1.1,dola,deco,dagcd
}

sampling() {
  evaluate sampling --limit 40 --batch-size 64 --controls --sample --seeds 0,1,2 --method vcd,icd,m3id
}

pruning() {
  local methods=() budget method
  for budget in 32 16 8; do # of 64 tokens
    for method in random_tokens uniform_grid downsample_image divprune hiprune visionzip vscan zoo_prune fastv pyramid_drop \
      sparsevlm ptp expected_attention knorm a_vl; do
      methods+=("$method:keep=$budget")
    done
  done
  evaluate pruning --limit 60 --batch-size 64 --method "$(IFS=,; echo "${methods[*]}")"
}

published-outputs() { # not of the default list: COPIES is a folder with clones of the repositories in pairs.json
  "$(dirname "$vlm_fix")/python" -m vlm_fix.eval.report.published_outputs results/published-outputs \
    --copies "${COPIES:?set COPIES to the folder with clones of the repositories, COPIES/OWNER/NAME}" \
    --page docs/published-outputs.md
}

bench() { # ratios in one run, on one thread
  export OMP_NUM_THREADS=1
  "$vlm_fix" bench attention --new-tokens 32 --rounds 3 --output results/bench/attention-small-cpu.json
  "$vlm_fix" bench decode --new-tokens 16 --rounds 3 --output results/bench/decode-small-cpu.json
  "$vlm_fix" bench prune --new-tokens 16 --rounds 3 --output results/bench/prune-small-cpu.json
}

for folder in "${@:-picto-shift attention decoding sampling pruning bench}"; do
  for each in $folder; do "$each"; done
done
