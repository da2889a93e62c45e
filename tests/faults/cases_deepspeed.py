"""DeepSpeed configs that are refused, with what the error must say."""

from faults.case import Case, ds_config, flags
from faults.damage import ds, pipe, put

DEEPSPEED: dict[str, Case] = {
    "no ds_config": ds_config(
        None, "{fixture}/ds.json: no such file; the DeepSpeed config (--deepspeed) should be there"
    ),
    "no such stage by name": flags(
        "--deepspeed zero4", "--deepspeed zero4: must be ", "zero3, ", " or the path of a JSON file"
    ),
    "ds_config, no JSON": ds_config(
        put("ds.json", '{"a": 1,}'), "ds.json:1: column 9: ", "correct {fixture}/ds.json"
    ),
    "ds_config, key twice": ds_config(
        put("ds.json", '{"zero_optimization": {"stage": 2,\n"stage": 3}}'),
        "ds.json:2: column 1: key 'stage' appears twice in one object",
    ),
    "ds_config, unknown key": ds_config(
        ds(zero_optimisation={}),
        "ds.json: unknown key 'zero_optimisation'; did you mean 'zero_optimization'?",
    ),
    "ds_config, unknown key of zero": ds_config(
        ds(zero_optimization={"stage": 2, "overlap_com": True}),
        "ds.json: unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?",
    ),
    "ds_config, unknown key of offload": ds_config(
        ds(zero_optimization={"stage": 3, "offload_param": {"devise": "cpu"}}),
        "ds.json: DeepSpeed refuses offload_param.devise 'cpu': Extra inputs are not permitted",
    ),
    "ds_config, shards that are unknown": ds_config(
        ds(frozen_shards="host"),
        'ds.json: frozen_shards is "host"; use "node", "all" or "auto"',
    ),
    "ds_config, shards below stage 3": ds_config(
        ds(frozen_shards="node"),
        'ds.json: frozen_shards "node" is for stage 3, and the stage is ',
    ),
    "ds_config, a number as text": ds_config(
        ds(zero_optimization={"stage": 2, "reduce_bucket_size": "big"}),
        "ds.json: DeepSpeed refuses reduce_bucket_size 'big': Input should be a valid integer",
    ),
    "ds_config, another type for gradients": ds_config(
        ds(communication_data_type="bf16"),
        "ds.json: 'communication_data_type' must go: gradients are summed in fp32",
    ),
    "ds_config, a switch as text": ds_config(
        ds(wall_clock_breakdown="yes"), 'wall_clock_breakdown is "yes" and must be true or false'
    ),
    "ds_config, no stage": ds_config(
        put("ds.json", "{}"), "ds.json: zero_optimization.stage is null; use 1, 2 or 3"
    ),
    "ds_config, stage 0": ds_config(
        ds(zero_optimization={"stage": 0}), "ds.json: zero_optimization.stage is 0; use 1, 2 or 3"
    ),
    "ds_config, stage true": ds_config(
        ds(zero_optimization={"stage": True}),
        "ds.json: zero_optimization.stage is true; use 1, 2 or 3",
    ),
    "ds_config, batch size": ds_config(
        ds(train_batch_size=7),
        "train_batch_size 7 does not fit --batch_size 4 --accum_iter 1 on 1 rank(s), "
        'which make 4; write "auto"',
    ),
    "ds_config, micro-batch of 0": ds_config(
        ds(train_micro_batch_size_per_gpu=0),
        "train_micro_batch_size_per_gpu 0 does not fit",
        'write "auto"',
    ),
    "ds_config, accumulation": ds_config(
        ds(gradient_accumulation_steps="2"), 'gradient_accumulation_steps "2" does not fit'
    ),
    "ds_config, optimizer": ds_config(
        ds(optimizer={"type": "Adam"}),
        "ds.json: 'optimizer' must go: ",
        "use --lr, --blr and --weight_decay",
    ),
    "ds_config, clipping": ds_config(
        ds(gradient_clipping=1.0), "ds.json: 'gradient_clipping' must go: the method does not clip"
    ),
    "ds_config, precision": ds_config(
        ds(bf16={"enabled": True}),
        'ds.json: bf16.enabled true against --precision fp32; write "auto"',
    ),
    "ds_config, bf16 as a value": ds_config(
        ds(bf16=True), "ds.json: 'bf16' must be a section of its own"
    ),
    "ds_config, round robin": ds_config(
        ds(zero_optimization={"stage": 2, "round_robin_gradients": True}),
        "ds.json: 'zero_optimization.round_robin_gradients' must go: checkpoints are not tested",
    ),
    "ds_config, hpz": ds_config(
        ds(zero_optimization={"stage": 3, "zero_hpz_partition_size": 2}),
        "ds.json: 'zero_optimization.zero_hpz_partition_size' must go: ",
    ),
    "ds_config, NVMe": ds_config(
        ds(
            zero_optimization={
                "stage": 3,
                "offload_param": {"device": "nvme", "nvme_path": "/tmp"},
            }
        ),
        'ds.json: zero_optimization.offload_param.device is "nvme"; use "cpu" or leave it out',
    ),
    "ds_config, NVMe for the optimizer": ds_config(
        ds(zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}),
        'zero_optimization.offload_optimizer.device is "nvme"; use "cpu" or leave it out',
    ),
    "ds_config, a part of the optimizer": ds_config(
        ds(
            zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        ),
        "'zero_optimization.offload_optimizer.ratio' must go: ",
    ),
    "ds_config is a pipe": ds_config(
        pipe("ds.json"),
        "{fixture}/ds.json: the DeepSpeed config (--deepspeed) cannot be read (a device or a pipe",
    ),
    "ds_config, deep": ds_config(put("ds.json", "[" * 100_000), "ds.json:1: column 1: "),
    "ds_config, a number without end": ds_config(
        put("ds.json", '{"steps_per_print": ' + "9" * 10_000 + "}"), "ds.json:1: column 1: "
    ),
}
