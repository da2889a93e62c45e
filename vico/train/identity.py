"""Which settings make a run what it is, and which may change when it is resumed."""

# Settings that may change when a run is resumed: paths, logging, and how a step is divided into
# micro-batches. None changes the result. (Resuming checks that a step keeps its questions.)
NOT_IDENTITY = frozenset(
    """
    model llama_model_path data_path captions features missing_features output_dir resume init_eval
    split max_steps num_workers deepspeed attention checkpoint_activations batch_size accum_iter
    max_tokens save_steps save_total_limit save_legacy logging_steps report_to allow_change verify
    collective_timeout hang_timeout expect_world_size missing_subtitles missing_captions no_eval
    eval_captions text attention_shares
    """.split()
)
# What must not change either when a run is resumed (checkpoint/fingerprint.py).
FINGERPRINTED = ("data", "backbone", "tokenizer")
# The shapes of a checkpoint's tensors follow from these. Evaluation takes them from the checkpoint.
SHAPES = ("adapter_layer", "adapter_len", "max_feats")
# They have no effect on an evaluation.
SAVING = """
    save_steps save_total_limit save_legacy logging_steps report_to eval_captions text
    attention_shares keep
""".split()
