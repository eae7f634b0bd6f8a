#!/usr/bin/env bash
# Makes every file of this folder again: results/reproduce.sh [FOLDER...], by default all tables of both Picto models and bench.
#
# A folder is MODEL-TABLE, with picto-llava or picto-smol, and shift, attention, heads, hidden, decoding, contrast, recent,
# gated, sampling or pruning.
# picto-llava's tables take about an hour and a half on one core, picto-smol's three hours: an interrupted table goes on when
# it is asked for again. Give `bench` alone on an idle machine. picto-smol needs `make picto-smol`, and picto-smol-calibration
# once before heads, attention and decoding, unless the checkpoint has its calibration/ already.
#
#   LIMIT=4 results/reproduce.sh FOLDER   tries a table on 4 scenes: tables in runs/, results/ stays as it is
#   VLM_FIX=...                           another vlm-fix
set -euo pipefail
cd "$(dirname "$0")/.."
vlm_fix=${VLM_FIX:-.venv/bin/vlm-fix}

evaluate() { # FOLDER MODEL SCENES ARGUMENT...
  local out=runs/$1${LIMIT:+-$LIMIT} dtype=float32
  [ "$2" = picto-smol ] && dtype=bfloat16 # as such models are run
  "$vlm_fix" eval all --model "$2" --dtype $dtype --data picto:shift --seed 0 --variant pattern --limit "${LIMIT:-$3}" --output "$out" \
    --resume "${@:4}"
  [ -n "${LIMIT:-}" ] && return
  mkdir -p "results/$1"
  cp "$out/results.json" "$out/table.md" "results/$1/"
}

join() { local IFS=,; echo "$*"; }

compare() { # FOLDER MODEL SCENES METHODS: with searched strengths and controls
  local methods
  methods=$(searched "$2" "$4")
  evaluate "$1" "$2" "$3" --batch-size "$batch" $splits --controls --method "$methods"
}

table() { # MODEL TABLE; picto-smol, twenty times as large, gets fewer scenes, two of POPE's splits and smaller batches
  local model=$1 folder=$1-$2 scenes=60 few=30 prune=30 shift=300 batch=64 splits=
  if [ "$model" = picto-smol ]; then
    scenes=40 few=15 prune=20 shift=100 batch=32 splits="--split random,adversarial"
    [ "$2" = attention ] && scenes=60
  fi
  case $2 in
    shift)
      local gate=; [ "$model" = picto-smol ] && gate=var:tau=15, # where VAR's gate opens, see its card
      evaluate "$folder" "$model" $shift --batch-size 32 --method "var,${gate}vhr,pai,vcd,hiprune" ;;
    attention)
      compare "$folder" "$model" $scenes act,ad_hh,avar,cca,gift,hgai,locore,pai,paint,tame,vaf,var,zerotuning ;;
    heads) compare "$folder" "$model" $scenes spin,vhr,head_pursuit ;;
    hidden)
      compare "$folder" "$model" $scenes iri,hulluedit,memvr,rudder,vista,nullu,vti ;;
    decoding)
      compare "$folder" "$model" $scenes \
        vcd,icd,m3id,sid,decore,iava,causalmm,layercake,pai:gamma=1.1,dola,deco,dagcd,only ;;
    contrast) # the newer ones; crops is gated, and vcd and m3id can be
      compare "$folder" "$model" $scenes owl,avisc,ritual,crops,attention_buckets,vcd:gate=0.9,m3id:gate=0.9,visual_topk ;;
    recent) # of several kinds; contrast, attention and pruning were measured before they were there
      compare "$folder" "$model" $scenes ascd,shield,pade,farsight,visiontrim:keep=32,visiontrim:keep=8 ;;
    gated) # those whose controls were mended after contrast and hidden were measured
      compare "$folder" "$model" $scenes crops,vcd:gate=0.9,m3id:gate=0.9,rudder ;;
    sampling)
      evaluate "$folder" "$model" $few --batch-size $batch $splits --controls --sample --seeds 0,1,2 --method vcd,icd,m3id ;;
    pruning)
      local methods=() budget method budgets="32 16 8"
      [ "$model" = picto-smol ] && budgets="32 8"
      for budget in $budgets; do # of 64 tokens; random_tokens, uniform_grid and downsample_image are the controls
        for method in random_tokens uniform_grid downsample_image divprune hiprune visionzip vscan zoo_prune fastv \
          pyramid_drop sparsevlm ptp expected_attention knorm a_vl cdpruner vispruner dart holov scope prumerge flowcut \
          agilepruner kvcompose; do
          methods+=("$method:keep=$budget")
        done
      done
      evaluate "$folder" "$model" $prune --batch-size $batch $splits --method "$(join "${methods[@]}")" ;;
  esac
}

# The strengths that are tried, on scenes of other types and looks than the tables': METHOD OPTION=A|B|C, with the default among them.
strengths() {
  cat << 'END'
pai alpha=0.05|0.1|0.2|0.4|0.8
vaf enhance=1.15|1.4|1.8|2.5
avar visual=1.15|1.4|1.8|2.5
hgai alpha=0.1|0.25|0.5|1|2
paint alpha=0.35|0.7|1.4
tame gamma=0.6|0.8|1.1
var tau=10|15|20
zerotuning rate=0.3|0.6|1.5
spin epsilon=0.08|0.5
vhr alpha=1.25|1.5|2
vista lam=0.05|0.17|0.3
vti alpha_text=0|0.9 alpha_vision=0|0.9
nullu rank=1|4|8
rudder alpha=0.1|0.25|1
memvr ratio=0.06|0.12|0.24
hulluedit blend=0.25|0.76|1
iri lambda_a=0.26|1|2
head_pursuit factor=2|5
only alpha_add=1|3
vcd alpha=0.5|1|2
icd alpha=0.5|1|2
m3id decay=0.01|0.02|0.1
sid alpha=0.5|1|2
decore alpha=0.5|1
iava alpha=0.5|1|2
causalmm gamma=0.5|1|2
layercake alpha=0.5|1|2
dola alpha=0.5|1
deco alpha=0.3|0.6
dagcd alpha=2|4|8
owl lam=0.5|1|2
avisc alpha=0.5|1|2
ritual alpha=1|3
crops alpha=0.5|1|2
ascd alpha=0.5|1|2
shield alpha=0.5|1|2
pade lam=0.05|0.1|0.3
farsight sigma=0.05|0.1|0.3
END
}

search() { # MODEL [METHOD...]: results/search/MODEL/METHOD.json, or METHOD.txt with the sentence why nothing was found
  local model=$1 method values value words dtype=float32
  [ "$model" = picto-smol ] && dtype=bfloat16
  mkdir -p "results/search/$model"
  strengths | while read -r method values; do
    [[ $# -gt 1 && " ${*:2} " != *" $method "* ]] && continue
    words=()
    for value in $values; do words+=(--search "$value"); done
    [[ -s results/search/$model/$method.json || -s results/search/$model/$method.txt ]] && continue # as it was interrupted
    "$vlm_fix" calibrate "$method" --model "$model" --data picto:train --limit "${LIMIT:-80}" --seed 1 --dtype $dtype \
      "${words[@]}" --out "results/search/$model/$method.json" 2>&1 < /dev/null | tee >(cat >&2) | tail -n 1 \
      > "results/search/$model/$method.txt" || continue # the sentence says why
    rm "results/search/$model/$method.txt"
  done
}

searched() { # MODEL METHODS: the methods at their defaults and, where a search found another strength, at that one as well
  "$(dirname "$vlm_fix")/python" - "$@" << 'END'
import json, pathlib, shlex, sys
from vlm_fix.registry import get_method

model, methods = sys.argv[1:]
specs = []
for method in methods.split(","):
    specs.append(method)
    file = pathlib.Path("results/search", model, method + ".json")
    if not file.exists():
        continue
    made = json.loads(file.read_text())
    words = shlex.split(made["command"])
    tried = [b.partition("=")[0] for a, b in zip(words, words[1:]) if a == "--search"]
    default, found = get_method(method)(), {k: v for k, v in made["found"].items() if not tried or k in tried}
    if any(v != getattr(default, k) for k, v in found.items()):
        spell = {k: "|".join(map(str, v)) if isinstance(v, list) else v for k, v in found.items()}
        specs.append(method + ":" + ",".join(f"{k}={v}" for k, v in spell.items()))
print(",".join(specs))
END
}

picto-llava-search() { search picto-llava; }
picto-smol-search() { search picto-smol; }

picto-smol-calibration() { # into the checkpoint's parts: model_path puts them beside the weights
  mkdir -p eval/picto/picto-smol/calibration
  for method in ad_hh ascd decore head_pursuit iri nullu vti; do
    "$vlm_fix" calibrate "$method" --model picto-smol --data picto:train --limit "${LIMIT:-100}" --seed 0 --dtype bfloat16 \
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
  "$vlm_fix" bench scaling --shape thin --sizes "visual=1024|4096|8100|16384" --new-tokens 2 --rounds 0 --device cpu \
    --method "pai,act:threshold=0.01,vhr,iri:rr_attention=1|0.75|0.5|0.25,rr_mlp=1|0.75|0.5|0.25,vcd,deco,hiprune:keep=0.25,fastv:keep=0.25,knorm:keep=0.25" \
    --figure docs/images/scaling-memory.svg --output results/bench/scaling-memory-cpu.json
  "$vlm_fix" bench peers --shape tiny --new-tokens 16 --rounds 3 --output results/bench/peers.json # with mitigv and kvpress: docs/performance.md
  "$vlm_fix" bench serve --model picto-smol --method pai,vaf,vhr,rudder,deco,vcd,hiprune:keep=0.25 --new-tokens 16 --rounds 3 \
    --output results/bench/serve.json # needs vLLM and 20 GB: docs/serving.md
  "$vlm_fix" bench serve --model picto-smol --method pai,vhr --concurrent 32 --questions 32 --new-tokens 16 --rounds 3 \
    --output results/bench/serve-questions.json # as above
}

tables=(shift attention heads hidden decoding contrast recent gated sampling pruning)
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
