"""Flags and recipes that are refused, with what the error must say."""

from faults.case import RECIPE, Case, flags, recipe, refused
from faults.damage import link, pipe

# 2 * 9 ** 12 words, if they were expanded.
ALIASES = "lr:\n- &a0 [x, x]\n"
for _i in range(1, 13):
    ALIASES += f"- &a{_i} [{', '.join([f'*a{_i - 1}'] * 9)}]\n"

# 2 ** 59 pairs, if they were merged.
MERGES = "a0: &a0 {x: 1}\n"
for _i in range(1, 60):
    MERGES += f"a{_i}: &a{_i} {{<<: [*a{_i - 1}, *a{_i - 1}]}}\n"

SETTINGS: dict[str, Case] = {
    "unknown command": flags(
        "trian", "unknown command 'trian'; did you mean 'train'?; use one of train, eval, "
    ),
    "unknown flag": flags(
        "--batchsize 4", "unknown flag --batchsize; did you mean '--batch_size'?"
    ),
    "dashes in a flag": flags(
        "--batch-size=4", "unknown flag --batch-size; did you mean '--batch_size'?"
    ),
    "not a number": flags("--batch_size 1e3", "--batch_size: '1e3' is not a whole number"),
    "no value": flags("--lr", "--lr: expected one argument"),
    "value of a switch": flags("--vaq=true", "--vaq: takes no value, but was given 'true'"),
    "stray word": flags("--vaq true", "unexpected word 'true': ", "switches take none"),
    "no such quantization": flags("--quantize fp4", "--quantize: ", "'fp4'", "8bit", "fp8"),
    "nf4 under ZeRO-3": flags(
        "--quantize nf4 --deepspeed zero3",
        "--quantize nf4: is for ZeRO-2, and --deepspeed zero3 is ZeRO-3; leave one out",
    ),
    "batch of 0": flags("--batch_size 0", "--batch_size 0: must be a whole number of at least 1"),
    "lr nan": flags("--lr nan", "--lr nan: must be above 0, and finite"),
    "beyond fp32": flags("--bias 1e39", "--bias 1e+39: must be finite"),
    "negative decay": flags(
        "--weight_decay -0.1", "--weight_decay -0.1: must be 0 or more, and finite"
    ),
    "seed too large": flags(
        "--seed 99999999999999999999",
        "--seed 99999999999999999999: must be a whole number from 0 to ",
    ),
    "no command": flags("!--epochs 3", "--epochs: a command comes first, as in vico train"),
    "near a retired flag": flags("--devic cuda", "unknown flag --devic; see vico train --help"),
    "two names, two values": flags(
        "--lr 1e-3 --learning_rate 1e-4",
        "--lr 0.001 and --learning_rate 0.0001 say different things; keep one",
    ),
    "two precisions": flags(
        "--bf16 --fp16", "--precision fp32 and --bf16 true say different things; keep one"
    ),
    "a warm-up of two lengths": flags(
        "--warmup_ratio 0.5 --warmup_epochs 3",
        "--warmup_ratio 0.5 of 1 epochs and --warmup_epochs 3 say different things",
    ),
    "a warm-up above the whole": flags(
        "--warmup_ratio 40", "--warmup_ratio 40.0: must be from 0 to 1, a share of --epochs"
    ),
    "another schedule": flags(
        "--lr_scheduler_type linear",
        "--lr_scheduler_type linear: the learning rate rises linearly (--warmup_epochs), then",
    ),
    "half an epoch": flags(
        "--num_train_epochs 2.5", "--num_train_epochs: '2.5' is not a whole number"
    ),
    "override of an unknown key": flags(
        "train learnin_rate=1",
        "learnin_rate=1: unknown key 'learnin_rate'; did you mean 'learning_rate'",
    ),
    "override, neither on nor off": flags(
        "train vaq=maybe", "vaq is 'maybe'; a switch is yes or no"
    ),
    "override against a flag": flags(
        "--lr 0.1 lr=0.2", "--lr 0.1 and lr=0.2 say different things; keep one"
    ),
    "logging_steps of 0": flags(
        "--logging_steps 0", "--logging_steps 0: must be a whole number of at least 1"
    ),
    "no captions to write": flags(
        "--eval_captions 0", "--eval_captions 0: must be a whole number of at least 1"
    ),
    "captions to compare with and none read": flags(
        "--eval_captions 3 --cap 0", "--eval_captions 3: must be left out with --no_eval or --cap 0"
    ),
    "captions with an evaluation that is off": flags(
        "--eval_captions 3 --no_eval", "--eval_captions 3: must be left out with --no_eval"
    ),
    "nothing to keep": flags("--keep 1", "--keep 1.0: must be given together with --text FILE"),
    "a weight in words": flags("--keep much", "--keep: 'much' is not a number"),
    "two weights": flags("--keep keep=3", "--keep 1.0 and keep=3.0 say different things; keep one"),
    "a weight below 0": flags("--keep -1", "--keep -1.0: must be 0 or more, and at most 1e+15"),
    "no such text": flags(
        "--text absent.txt", "absent.txt: no such file; plain text should be there"
    ),
    "a text twice": flags("--text a.txt a.txt", "--text: a.txt is there twice; name each file"),
    "texts with an evaluation that is off": flags(
        "--text a.txt --no_eval", "--text a.txt: must be left out with --no_eval"
    ),
    "reporter that is none": flags(
        "--report_to mlflow",
        "--report_to mlflow: must be none, all, or some of tensorboard, wandb, trackio",
    ),
    "no reporter and one": flags("--report_to none,wandb", "--report_to none,wandb: must be none"),
    "no such help": flags("--help lr", "--help lr: no such group of flags; there are all, "),
    "unknown data set": flags(
        "--dataset nextQA",
        "--dataset 'nextQA': there is no such data set; it can be nextqa, star, tvqa, intentqa",
        "did you mean 'nextqa'?",
    ),
    "subtitles of NExT-QA": flags("--sub", "--sub: only TVQA has subtitles", "drop --sub"),
    "unset variable": flags("--output_dir=", "--output_dir: '' is not a path in UTF-8"),
    "more layers than there are": flags(
        "--adapter_layer 4", "--adapter_layer 4: the model has 3 layers; leave it out to adapt all"
    ),
    "no room for a question": flags(
        "--max_seq_len 60",
        "train.csv:2: the question alone is ",
        "above --max_seq_len 60; raise it",
    ),
    "no room for the video": flags(
        "--max_feats 256", "--max_feats 256: must be below --max_seq_len 256"
    ),
    "no room for a caption": flags(
        "--max_cap_len 30", "--max_cap_len 30: leaves no caption token to learn; ", "is the least"
    ),
    "no recipe": refused(
        None, "{fixture}/r.yaml: no such file; the recipe (--config) should be there", line=RECIPE
    ),
    "recipe, unknown key": recipe(
        "batchsize: 4\n", "--config {fixture}/r.yaml: unknown key 'batchsize'; did you mean"
    ),
    "recipe, key twice": recipe(
        "lr: 1\nlr: 2\n", "--config {fixture}/r.yaml: 'lr' appears twice; keep one"
    ),
    "recipe, two names for a key": recipe(
        "lr: 1\nlearning_rate: 2\n",
        "--config {fixture}/r.yaml: lr: 1 and learning_rate: 2 say different things; keep one",
    ),
    "recipe, wrong type": recipe(
        "vaq: 'yes'\n", "--config {fixture}/r.yaml: vaq: 'yes' is not true or false"
    ),
    "recipe, wrong choice": recipe(
        "precision: 16\n", "r.yaml: precision: 16 is not one of bf16, fp16, fp32"
    ),
    "recipe, a list": recipe(
        "- lr: 1\n", "--config {fixture}/r.yaml: must hold lines 'flag: value'"
    ),
    "recipe, broken": recipe(
        "lr:\t1\n\tx: 2\n", "--config {fixture}/r.yaml: not valid YAML: ", "line 1, column 4"
    ),
    "recipe, latin-1": recipe(
        "# é".encode("latin-1"),
        "r.yaml:1: not UTF-8 (byte 0xe9 at offset 2); save {fixture}/r.yaml",
    ),
    "recipe, runs code": recipe(
        "lr: !!python/object/apply:os.mkdir ['vico-canary']\n",
        "--config {fixture}/r.yaml: not valid YAML: could not determine a constructor for the tag",
    ),
    "recipe, aliases without end": recipe(
        ALIASES,
        "--config {fixture}/r.yaml: lr: [",
        "is not a number",
    ),
    "recipe, texts without end": recipe(
        ALIASES.replace("lr", "text"),
        "--config {fixture}/r.yaml: text: [",
        "is not a path in UTF-8, or a list of them",
    ),
    "recipe, merges without end": recipe(
        MERGES, "--config {fixture}/r.yaml: holds a merge ('<<'); write its flags out"
    ),
    "recipe, 60,000 keys": recipe(
        "".join(f"key{i}: 1\n" for i in range(60_000)),
        "--config {fixture}/r.yaml: 708,890 characters, where at most 32,768 are expected",
    ),
    "recipe is a pipe": refused(
        pipe("r.yaml"),
        "{fixture}/r.yaml: the recipe (--config) cannot be read (a device or a pipe, not a file)",
        line=RECIPE,
    ),
    "recipe is a device": refused(
        link("r.yaml", "/dev/zero"),
        "r.yaml: the recipe (--config) cannot be read (a device or a pipe",
        line=RECIPE,
    ),
    "recipe, another tag": recipe(
        "lr: !!python/name:os.system\n", "r.yaml: not valid YAML: could not determine a constructor"
    ),
    "recipe, a key that forges lines": recipe(
        '"x\\nvico: done": 1\n', "unknown key 'x\\nvico: done'"
    ),
    "recipe, deep": recipe("lr: " + "[" * 5000, "--config {fixture}/r.yaml: "),
    "recipe, a date": recipe(
        "lr: 2024-01-01\n", "r.yaml: lr: datetime.date(2024, 1, 1) is not a number"
    ),
    "recipe, infinity": recipe("lr: .inf\n", "--lr inf: must be above 0, and finite"),
    "recipe, no key but null": recipe("? \n: 1\n", "r.yaml: unknown key None"),
    "allow_change of nothing": flags(
        "--allow_change sed", "--allow_change sed: no such setting; did you mean 'seed'?"
    ),
    "missing_features of another kind": flags(
        "--missing_features skip",
        "--missing_features: invalid choice: 'skip' (choose from 'error', 'drop')",
    ),
    "check, unknown flag": flags(
        "check --batchsize 4", "unknown flag --batchsize; did you mean '--batch_size'?"
    ),
    "eval, unknown split": flags("eval --split dev", "--split: invalid choice: 'dev'"),
}
