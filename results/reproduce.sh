#!/usr/bin/env bash
# Makes every file of this folder again: results/reproduce.sh [FOLDER...], by default all tables of both Picto models and bench.
#
# A folder is MODEL-TABLE, with picto-llava or picto-smol, and shift, attention, heads, hidden, decoding, sampling or pruning.
# picto-llava's tables take about an hour and a half on two cores, picto-smol's most of a day: an interrupted table goes on when
# it is asked for again. Give `bench` alone on an idle machine. picto-smol needs `make picto-smol`, and picto-smol-calibration
# once before heads, attention and decoding, unless the checkpoint has its calibration/ already.
#
#   LIMIT=4 results/reproduce.sh FOLDER   tries a table on 4 scenes: tables in runs/, results/ stays as it is
#   VLM_FIX=...                           another vlm-fix
set -euo pipefail
cd "$(dirname "$0")/.."
vlm_fix=${VLM_FIX:-.venv/bin/vlm-fix}

evaluate() { # FOLDER MODEL SCENES ARGUMENT...
  local out=runs/$1${LIMIT:+-$LIMIT}
  "$vlm_fix" eval all --model "$2" --data picto:shift --seed 0 --variant pattern --limit "${LIMIT:-$3}" --output "$out" \
    --resume "${@:4}"
  [ -n "${LIMIT:-}" ] && return
  mkdir -p "results/$1"
  cp "$out/results.json" "$out/table.md" "results/$1/"
}

join() { local IFS=,; echo "$*"; }

table() { # MODEL TABLE [FOLDER]; picto-smol, twenty times as large, gets fewer scenes and smaller batches
  local model=$1 folder=${3:-$1-$2} scenes=150 few=40 prune=60 shift=300 batch=64
  [ "$model" = picto-smol ] && scenes=60 few=20 prune=30 shift=100 batch=32
  case $2 in
    shift) evaluate "$folder" "$model" $shift --batch-size 32 --method var,vhr,pai,vcd,hiprune ;;
    attention)
      evaluate "$folder" "$model" $scenes --batch-size $batch --controls \
        --method act,ad_hh,avar,cca,gift,hgai,locore,pai,paint,tame,vaf,var,zerotuning ;;
    heads) evaluate "$folder" "$model" $scenes --batch-size $batch --controls --method spin,vhr,head_pursuit ;;
    hidden) evaluate "$folder" "$model" $scenes --batch-size $batch --controls --method iri ;;
    decoding)
      evaluate "$folder" "$model" $scenes --batch-size $batch --controls \
        --method vcd,icd,m3id,sid,decore,iava,causalmm,layercake,pai:gamma=1.1,dola,deco,dagcd ;;
    sampling)
      evaluate "$folder" "$model" $few --batch-size $batch --controls --sample --seeds 0,1,2 --method vcd,icd,m3id ;;
    pruning)
      local methods=() budget method
      for budget in 32 16 8; do # of 64 tokens; random_tokens, uniform_grid and downsample_image are the controls
        for method in random_tokens uniform_grid downsample_image divprune hiprune visionzip vscan zoo_prune fastv \
          pyramid_drop sparsevlm ptp expected_attention knorm a_vl; do
          methods+=("$method:keep=$budget")
        done
      done
      evaluate "$folder" "$model" $prune --batch-size $batch --method "$(join "${methods[@]}")" ;;
  esac
}

picto-smol-calibration() { # into the checkpoint's parts: model_path puts them beside the weights
  mkdir -p eval/picto/picto-smol/calibration
  for method in ad_hh decore head_pursuit iri; do
    "$vlm_fix" calibrate "$method" --model picto-smol --data picto:train --limit "${LIMIT:-100}" --seed 0 \
      --out "eval/picto/picto-smol/calibration/$method.json"
  done
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

# The tables of picto-llava from before there was picto-smol; picto-llava-TABLE takes the place of each.
picto-shift() { table picto-llava shift picto-shift; }
attention() {
  evaluate attention picto-llava 150 --batch-size 64 \
    --method act,ad_hh,avar,cca,gift,hgai,locore,pai,paint,tame,vaf,var,zerotuning,spin,vhr,iri,head_pursuit
}
decoding() { table picto-llava decoding decoding; }
sampling() { table picto-llava sampling sampling; }
pruning() { table picto-llava pruning pruning; }

tables=(shift attention heads hidden decoding sampling pruning)
if [ $# = 0 ]; then
  set -- "${tables[@]/#/picto-llava-}" picto-smol-calibration "${tables[@]/#/picto-smol-}" bench
fi
for folder in "$@"; do
  if declare -F "$folder" > /dev/null; then
    "$folder"
  elif [[ $folder =~ ^(picto-llava|picto-smol)-(.+)$ ]] && [[ " ${tables[*]} " == *" ${BASH_REMATCH[2]} "* ]]; then
    table "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
  else
    echo "reproduce.sh: no folder is called $folder; see the lines at its top." >&2
    exit 2
  fi
done
