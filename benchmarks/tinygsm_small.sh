#!/bin/sh
# From rows of text to a score on GSM8K for every small recipe, one after the other; what is done is not done again.
#   benchmarks/tinygsm_small.sh OUT TOKENIZER TEST.jsonl ROWS.jsonl.gz...     then: python benchmarks/tinygsm_small.py OUT
# STEPS, SEEDS (of uniform and puma), EXAMPLES and THREADS may be set. Runs on fewer cores at once: give each THREADS.
set -eu
out=$1 tokenizer=$2 test=$3
shift 3
steps=${STEPS:-800} examples=${EXAMPLES:-100} threads=${THREADS:-2}
data=$out/data
[ -e "$data" ] || unmask prepare tinygsm "$@" --tokenizer "$tokenizer" --length 256 --too-long drop --vocab used --out "$data"

run() { # recipe seed decoder [settings]
    recipe=$1 seed=$2 decoder=$3 folder=$out/runs/$1/seed_$2
    shift 3
    [ -s "$folder/heldout.json" ] && return
    unmask train "tinygsm/$recipe" "data.path=$data" "train.steps=$steps" "train.seed=$seed" "train.threads=$threads" \
        eval.every=200 "$@" --out "$folder" --resume
    unmask eval "$folder" --task gsm8k --data "$test" --examples "$examples" --decoder "$decoder" --json >"$folder/gsm8k.json"
    unmask eval "$folder" --examples "$examples" --decoder "$decoder" --json >"$folder/heldout.json"
}

three=prob,tokens_per_step=3
quick='eval.tokens_per_step=[24]' # a look while training: the scores come from `unmask eval`
run ar_small 0 left_to_right
run uniform_from_ar_small 0 "$three" "train.init=$out/runs/ar_small/seed_0" "$quick"
run puma_from_ar_small 0 "$three" "train.init=$out/runs/ar_small/seed_0" "$quick"
run puma_variable_small 0 "$three" "$quick"
for seed in ${SEEDS:-0 1 2}; do
    run uniform_small "$seed" "$three" "$quick"
    run puma_small "$seed" "$three" "$quick"
done
