"""Commands that cannot be: flags, recipes, DeepSpeed configs and output folders, with what the line must say."""

from faults.damage import Case, both, copy, cut, ds, gone, link, pipe, put

RECIPE, DS, EVAL = (
    "--config {fixture}/r.yaml",
    "--deepspeed {fixture}/ds.json",
    "eval --resume {fixture}/",
)

SETTINGS: dict[str, Case] = {
    # flags
    "unknown command": (None, "trian", 2, ["unknown command 'trian'; use one of train, eval, "]),
    "unknown flag": (
        None,
        "--batchsize 4",
        2,
        ["unknown flag --batchsize; did you mean '--batch_size'?"],
    ),
    "dashes in a flag": (
        None,
        "--max-steps=4",
        2,
        ["unknown flag --max-steps; did you mean '--max_steps'?"],
    ),
    "not a number": (None, "--batch_size 1e3", 2, ["--batch_size: '1e3' is not a whole number"]),
    "no value": (None, "--lr", 2, ["--lr: expected one argument"]),
    "value of a switch": (None, "--vaq=true", 2, ["--vaq: takes no value, but was given 'true'"]),
    "stray word": (None, "--vaq true", 2, ["unexpected word 'true': ", "switches take none"]),
    "batch of 0": (
        None,
        "--batch_size 0",
        2,
        ["--batch_size 0: must be a whole number of at least 1"],
    ),
    "lr nan": (None, "--lr nan", 2, ["--lr nan: must be above 0, and finite"]),
    "beyond fp32": (None, "--bias 1e39", 2, ["--bias 1e+39: must be finite"]),
    "negative decay": (
        None,
        "--weight_decay -0.1",
        2,
        ["--weight_decay -0.1: must be 0 or more, and finite"],
    ),
    "seed too large": (
        None,
        "--seed 99999999999999999999",
        2,
        ["--seed 99999999999999999999: must be a whole number from 0 to "],
    ),
    "unknown data set": (
        None,
        "--dataset nextQA",
        2,
        ["--dataset: invalid choice: 'nextQA' (choose from 'nextqa', 'star'"],
    ),
    "subtitles of NExT-QA": (None, "--sub", 2, ["--sub: only TVQA has subtitles", "drop --sub"]),
    "unset variable": (None, "--output_dir=", 2, ["--output_dir: '' is not a path in UTF-8"]),
    "more layers than there are": (
        None,
        "--adapter_layer 4",
        2,
        ["--adapter_layer 4: the model has 3 layers; leave it out to adapt all"],
    ),
    "no room for a question": (
        None,
        "--max_seq_len 60",
        2,
        ["train.csv:2: the question alone is ", "above --max_seq_len 60; raise it"],
    ),
    "no room for the video": (
        None,
        "--max_feats 256",
        2,
        ["--max_feats 256: must be below --max_seq_len 256"],
    ),
    "no room for a caption": (
        None,
        "--max_cap_len 30",
        2,
        ["--max_cap_len 30: leaves no caption token to learn; ", "is the least"],
    ),
    # recipes
    "no recipe": (
        None,
        RECIPE,
        2,
        ["{fixture}/r.yaml: no such file; the recipe (--config) should be there"],
    ),
    "recipe, unknown key": (
        put("r.yaml", "batchsize: 4\n"),
        RECIPE,
        2,
        ["--config {fixture}/r.yaml: unknown key 'batchsize'; did you mean"],
    ),
    "recipe, key twice": (
        put("r.yaml", "lr: 1\nlr: 2\n"),
        RECIPE,
        2,
        ["--config {fixture}/r.yaml: 'lr' appears twice; keep one"],
    ),
    "recipe, wrong type": (
        put("r.yaml", "vaq: 'yes'\n"),
        RECIPE,
        2,
        ["--config {fixture}/r.yaml: vaq: 'yes' is not true or false"],
    ),
    "recipe, wrong choice": (
        put("r.yaml", "precision: 16\n"),
        RECIPE,
        2,
        ["r.yaml: precision: 16 is not one of bf16, fp16, fp32"],
    ),
    "recipe, a list": (
        put("r.yaml", "- lr: 1\n"),
        RECIPE,
        2,
        ["--config {fixture}/r.yaml: must hold lines 'flag: value'"],
    ),
    "recipe, broken": (
        put("r.yaml", "lr:\t1\n\tx: 2\n"),
        RECIPE,
        2,
        ["--config {fixture}/r.yaml: not valid YAML: ", "line 1, column 4"],
    ),
    "recipe, latin-1": (
        put("r.yaml", "# é".encode("latin-1")),
        RECIPE,
        2,
        ["r.yaml:1: not UTF-8 (byte 0xe9 at offset 2); save {fixture}/r.yaml"],
    ),
    "recipe, runs code": (
        put("r.yaml", "lr: !!python/object/apply:os.mkdir ['vico-canary']\n"),
        RECIPE,
        2,
        [
            "--config {fixture}/r.yaml: not valid YAML: could not determine a constructor for the tag"
        ],
    ),
    "recipe, aliases without end": (
        put(
            "r.yaml",
            "lr:\n- &a0 [x, x]\n"
            + "".join(f"- &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 13)),
        ),
        RECIPE,
        2,
        ["--config {fixture}/r.yaml: lr: [", "is not a number"],
    ),
    # DeepSpeed's config
    "no ds_config": (
        None,
        DS,
        2,
        ["{fixture}/ds.json: no such file; the DeepSpeed config (--deepspeed) should be there"],
    ),
    "no such stage by name": (
        None,
        "--deepspeed zero4",
        2,
        ["--deepspeed zero4: must be ", "zero3, ", " or the path of a JSON file"],
    ),
    "ds_config, no JSON": (
        put("ds.json", '{"a": 1,}'),
        DS,
        2,
        ["ds.json:1: column 9: ", "correct {fixture}/ds.json"],
    ),
    "ds_config, key twice": (
        put("ds.json", '{"zero_optimization": {"stage": 2,\n"stage": 3}}'),
        DS,
        2,
        ["ds.json:2: column 1: key 'stage' appears twice in one object"],
    ),
    "ds_config, unknown key": (
        ds(zero_optimisation={}),
        DS,
        2,
        ["ds.json: unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"],
    ),
    "ds_config, unknown key of zero": (
        ds(zero_optimization={"stage": 2, "overlap_com": True}),
        DS,
        2,
        ["ds.json: unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?"],
    ),
    "ds_config, unknown key of offload": (
        ds(zero_optimization={"stage": 3, "offload_param": {"devise": "cpu"}}),
        DS,
        2,
        ["ds.json: DeepSpeed refuses offload_param.devise 'cpu': Extra inputs are not permitted"],
    ),
    "ds_config, a number as text": (
        ds(zero_optimization={"stage": 2, "reduce_bucket_size": "big"}),
        DS,
        2,
        ["ds.json: DeepSpeed refuses reduce_bucket_size 'big': Input should be a valid integer"],
    ),
    "ds_config, no such type": (
        ds(communication_data_type="fp9"),
        DS,
        2,
        ["ds.json: DeepSpeed refuses a value: Invalid communication_data_type."],
    ),
    "ds_config, a switch as text": (
        ds(wall_clock_breakdown="yes"),
        DS,
        2,
        ['wall_clock_breakdown is "yes" and must be true or false'],
    ),
    "ds_config, no stage": (
        put("ds.json", "{}"),
        DS,
        2,
        ["ds.json: zero_optimization.stage is null; use 1, 2 or 3"],
    ),
    "ds_config, stage 0": (
        ds(zero_optimization={"stage": 0}),
        DS,
        2,
        ["ds.json: zero_optimization.stage is 0; use 1, 2 or 3"],
    ),
    "ds_config, stage true": (
        ds(zero_optimization={"stage": True}),
        DS,
        2,
        ["ds.json: zero_optimization.stage is true; use 1, 2 or 3"],
    ),
    "ds_config, batch size": (
        ds(train_batch_size=7),
        DS,
        2,
        [
            'train_batch_size 7 does not fit --batch_size 4 --accum_iter 1 on 1 rank(s), which make 4; write "auto"'
        ],
    ),
    "ds_config, micro-batch of 0": (
        ds(train_micro_batch_size_per_gpu=0),
        DS,
        2,
        ["train_micro_batch_size_per_gpu 0 does not fit", 'write "auto"'],
    ),
    "ds_config, accumulation": (
        ds(gradient_accumulation_steps="2"),
        DS,
        2,
        ['gradient_accumulation_steps "2" does not fit'],
    ),
    "ds_config, optimizer": (
        ds(optimizer={"type": "Adam"}),
        DS,
        2,
        ["ds.json: 'optimizer' must go: ", "use --lr, --blr and --weight_decay"],
    ),
    "ds_config, clipping": (
        ds(gradient_clipping=1.0),
        DS,
        2,
        ["ds.json: 'gradient_clipping' must go: the method does not clip"],
    ),
    "ds_config, precision": (
        ds(bf16={"enabled": True}),
        DS,
        2,
        ['ds.json: bf16.enabled true against --precision fp32; write "auto"'],
    ),
    "ds_config, bf16 as a value": (
        ds(bf16=True),
        DS,
        2,
        ["ds.json: 'bf16' must be a section of its own"],
    ),
    # where results go
    "output_dir is a file": (
        put("out", ""),
        "",
        2,
        ["--output_dir {fixture}/out: '{fixture}/out' is not a folder; choose another"],
    ),
    "output_dir in a file": (
        put("file", ""),
        "--output_dir {fixture}/file/out",
        2,
        ["--output_dir {fixture}/file/out: Not a directory; choose another"],
    ),
    "output_dir with a name too long": (
        None,
        "--output_dir {fixture}/" + "x" * 300,
        2,
        ["File name too long; choose another"],
    ),
    "output_dir of another run": (
        copy("run", "out"),
        "--blr 1 --vaq",
        2,
        [
            "{fixture}/out: holds a run with other settings (vaq, blr; table below); choose another --output_dir",
            "\n  vaq      false  true\n  blr      0.001  1.0\n",
        ],
    ),
    "output_dir of a run that cannot be told": (
        put("out/args.json", "{"),
        "",
        2,
        ["args.json:1: column 2: ", "choose another --output_dir"],
    ),
    "output_dir of the lineage": (
        put("out/log.txt", '{"epoch": 0}\n'),
        "",
        2,
        [
            "{fixture}/out/log.txt: is of another program or run (there is no args.json beside it); put that back, or choose another --output_dir"
        ],
    ),
    "output_dir with a damaged checkpoint": (
        both(copy("run", "out"), cut("out/checkpoint-1/optimizer.safetensors", 0)),
        "",
        3,
        [
            "{fixture}/out: none of its 1 checkpoints can be used ({fixture}/out/checkpoint-1/optimizer.safetensors: damaged (0 of ",
            "to start anew",
        ],
    ),
    "recipe is a pipe": (
        pipe("r.yaml"),
        RECIPE,
        2,
        ["{fixture}/r.yaml: the recipe (--config) cannot be read (a device or a pipe, not a file)"],
    ),
    "recipe is a device": (
        link("r.yaml", "/dev/zero"),
        RECIPE,
        2,
        ["r.yaml: the recipe (--config) cannot be read (a device or a pipe"],
    ),
    "recipe, another tag": (
        put("r.yaml", "lr: !!python/name:os.system\n"),
        RECIPE,
        2,
        ["r.yaml: not valid YAML: could not determine a constructor"],
    ),
    "recipe, a key that forges lines": (
        put("r.yaml", '"x\\nvico: done": 1\n'),
        RECIPE,
        2,
        ["unknown key 'x\\nvico: done'"],
    ),
    "recipe, deep": (
        put("r.yaml", "lr: " + "[" * 5000),
        RECIPE,
        2,
        ["--config {fixture}/r.yaml: "],
    ),
    "recipe, a date": (
        put("r.yaml", "lr: 2024-01-01\n"),
        RECIPE,
        2,
        ["r.yaml: lr: datetime.date(2024, 1, 1) is not a number"],
    ),
    "recipe, infinity": (
        put("r.yaml", "lr: .inf\n"),
        RECIPE,
        2,
        ["--lr inf: must be above 0, and finite"],
    ),
    "recipe, no key but null": (
        put("r.yaml", "? \n: 1\n"),
        RECIPE,
        2,
        ["r.yaml: unknown key None"],
    ),
    "ds_config is a pipe": (
        pipe("ds.json"),
        DS,
        2,
        [
            "{fixture}/ds.json: the DeepSpeed config (--deepspeed) cannot be read (a device or a pipe"
        ],
    ),
    "ds_config, deep": (put("ds.json", "[" * 100_000), DS, 2, ["ds.json:1: column 1: "]),
    "ds_config, a number without end": (
        put("ds.json", '{"steps_per_print": ' + "9" * 10_000 + "}"),
        DS,
        2,
        ["ds.json:1: column 1: "],
    ),
    "allow_change of nothing": (
        None,
        "--allow_change sed",
        2,
        ["--allow_change sed: no such setting; did you mean 'seed'?"],
    ),
    "missing_features of another kind": (
        None,
        "--missing_features skip",
        2,
        ["--missing_features: invalid choice: 'skip' (choose from 'error', 'drop')"],
    ),
    "check, unknown flag": (
        None,
        "check --batchsize 4",
        2,
        ["unknown flag --batchsize; did you mean '--batch_size'?"],
    ),
    "eval, unknown split": (None, "eval --split dev", 2, ["--split: invalid choice: 'dev'"]),
    "args.json that leads away": (
        both(copy("run", "out"), put("out/args.json", '{"output_dir": "/etc", "seed": 3}')),
        "",
        2,
        ["{fixture}/out: holds a run with other settings"],
    ),
    "args.json as a list": (
        both(copy("run", "out"), put("out/args.json", "[1]")),
        "",
        2,
        ["args.json:1: column 1: a list where a JSON object"],
    ),
    "checkpoints gone": (
        both(copy("run", "out"), gone("out/checkpoint-1/state.json")),
        "",
        3,
        ["none of its 1 checkpoints can be used"],
    ),
}
