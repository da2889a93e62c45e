"""The settings of a run: one typed, strict record of the published flags.

cli/flags.py fills it from defaults, a YAML recipe and flags, in this order. Nothing here imports
torch, so a mistyped flag is reported at once. Only train/ and cli/ see the record; the packages
below get plain values.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vico.data.mixture import DatasetChoice, dataset_names, parse_datasets, paths_by_dataset
from vico.errors import UserError, nearest
from vico.model.weights import folders
from vico.train.bounds import BOUNDS, COUNT, plain, unless_off, value_type
from vico.train.identity import FINGERPRINTED


def _flag(default: Any, group: str, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **extra})


MODEL, DATA, OBJECTIVE, OPTIMIZATION, RUN = "model", "data", "objective", "optimization", "run"
LOGS, RANKS = "saving and logging", "ranks"
REPORTERS = ("tensorboard", "wandb", "trackio")  # also the names of their packages


@dataclass(frozen=True)
class RunConfig:
    """All settings. Defaults are those of the published code, where it has the flag (METHOD 5)."""

    model: str = _flag(
        "7B",
        MODEL,
        "the weights: a folder inside --llama_model_path (7B, 13B, 33B, 65B or your own), or the "
        "path of a folder",
    )
    llama_model_path: Path = _flag(
        folders.DEFAULT, MODEL, "folder with tokenizer.model and one folder per model"
    )
    adapter_layer: int | None = _flag(
        None,
        MODEL,
        "number of top layers with adapter prompts and gates (default: all); all layers always run",
    )
    attention: Literal["auto", "plain", "blocks", "sdpa", "varlen", "flash_attn", "segment"] = (
        _flag("auto", MODEL, "attention implementation; all compute the same function")
    )
    checkpoint_activations: str = _flag(
        "none",
        MODEL,
        "none, full or N: recompute no layer, all layers or the lower N in backward (less memory, "
        "up to 1.5x the time)",
    )
    adapter_len: int = _flag(10, MODEL, "adapter prompts per adapted layer")
    max_feats: int = _flag(
        10,
        MODEL,
        "video slots per sequence; longer videos are sampled evenly, shorter ones padded with "
        "zero features",
    )
    bias: float = _flag(3.0, MODEL, "initial video-gate logit is -BIAS")
    tau: float = _flag(100.0, MODEL, "temperature of the softmax over frames in the QAV objective")
    precision: Literal["bf16", "fp16", "fp32"] = _flag(
        "bf16",
        MODEL,
        "dtype of the frozen weights and of the computation; trainables are always fp32",
    )
    quantize: Literal["8bit", "nf4", "fp8"] | None = _flag(
        None,
        MODEL,
        "the frozen linear layers in 8bit or nf4 (for small GPUs; ZeRO-2 only; extra 'quantized') "
        "or in fp8 (where GPUs multiply in it); `vico quantize-eval` measures the lost accuracy",
    )

    dataset: str = _flag(
        "nextqa",
        DATA,
        "nextqa, star, tvqa or intentqa, read from DATA_PATH/DATASET; several, with weights: "
        "nextqa,star:0.5",
    )
    data_path: Path = _flag(Path("data"), DATA, "folder that holds one folder per dataset")
    captions: Path | None = _flag(
        None,
        DATA,
        "caption file (JSON), if the dataset's folder holds no known one, or several; of several "
        "data sets: NAME=PATH,NAME=PATH",
    )
    missing_captions: Literal["error", "drop"] = _flag(
        "error", DATA, "training questions without caption: stop, or leave their caption loss out"
    )
    features: Path | None = _flag(
        None,
        DATA,
        "feature file (.pth, .pt, .safetensors, .h5), or folder with one of .npy, .pt, .pth, "
        ".safetensors per video, if the dataset's folder holds no clipvitl14.pth, or another; of "
        "several data sets: NAME=PATH,NAME=PATH",
    )
    missing_features: Literal["error", "drop"] = _flag(
        "error",
        DATA,
        "questions whose video has no features: stop with an error, or drop them and report the "
        "count with every result",
    )
    sub: bool = _flag(False, DATA, "TVQA: put the clip's subtitles into the prompt")
    missing_subtitles: Literal["error", "empty"] = _flag(
        "error", DATA, "questions without subtitles, with --sub: stop, or ask them without"
    )
    max_seq_len: int = _flag(
        512,
        DATA,
        "maximum tokens of a question's sequence; longer ones are shortened (dialogue first, then "
        "options), never the answer",
    )
    max_cap_len: int = _flag(
        384, DATA, "maximum tokens of a caption's sequence; longer captions are cut"
    )
    caption_crop: Literal["sentence", "none"] = _flag(
        "sentence",
        DATA,
        "train on a random suffix of the caption that starts at a sentence, or on the whole "
        "caption",
    )
    no_shuffle: bool = _flag(False, DATA, "take the training questions in file order")
    num_workers: int = _flag(
        2, DATA, "data-loading processes per rank; 0: load in the training process"
    )

    cap: float = _flag(
        0.5, OBJECTIVE, "weight of the captioning loss; 0: off, no caption file is read"
    )
    vaq: bool = _flag(
        False, OBJECTIVE, "add the VAQ objective: predict the question from video and answer"
    )
    qav: bool = _flag(
        False, OBJECTIVE, "add the QAV objective: predict the video from question and answer"
    )
    keep: float | None = _flag(
        None,
        OBJECTIVE,
        "weight of KL(frozen || adapted) per token on windows of --text, one with each question, "
        "so that the adapter leaves plain language as it was (default, or 0: off)",
    )

    batch_size: int = _flag(64, OPTIMIZATION, "questions per device and micro-batch")
    max_tokens: int | None = _flag(
        None,
        OPTIMIZATION,
        "maximum tokens per micro-batch, by which a step's questions are split; 0: by --batch_size "
        "(default: on a GPU the planner's, on a CPU 0; a resumed run keeps its own)",
    )
    accum_iter: int = _flag(1, OPTIMIZATION, "micro-batches per optimizer step")
    epochs: int = _flag(
        400,
        OPTIMIZATION,
        "passes over the training questions; also the length of the learning-rate schedule; a "
        "larger number prolongs a complete run",
    )
    warmup_epochs: float = _flag(
        40.0,
        OPTIMIZATION,
        "epochs of linear warm-up from 0, followed by a half cosine down to --min_lr",
    )
    lr: float | None = _flag(
        None, OPTIMIZATION, "peak learning rate (default: BLR * questions per step / 256)"
    )
    blr: float = _flag(1e-3, OPTIMIZATION, "base learning rate, per 256 questions of a step")
    min_lr: float = _flag(0.0, OPTIMIZATION, "learning rate at the end of the schedule")
    weight_decay: float = _flag(
        0.05, OPTIMIZATION, "AdamW weight decay, applied to every trainable"
    )

    output_dir: Path = _flag(
        Path("output_dir"),
        RUN,
        "where logs, predictions and checkpoints go; rerun the same command to resume",
    )
    resume: Path | None = _flag(
        None,
        RUN,
        "checkpoint to start from: a checkpoint folder, a published .pth file, a folder of `vico "
        "export`, or a run's folder: training takes its newest checkpoint, evaluation its best",
    )
    init_eval: bool = _flag(
        False,
        RUN,
        "with --resume: evaluate it and stop; without: evaluate the untrained model, then train",
    )
    no_eval: bool = _flag(
        False, RUN, "evaluate no epoch: no val split is read, and no checkpoint_best is kept"
    )
    eval_captions: int | None = _flag(
        None,
        RUN,
        "with each evaluation of an epoch, write captions of the split's first N videos that have "
        "one, and log CIDEr, BLEU and ROUGE-L (eval/cider); needs the extra 'captions'",
    )
    text: tuple[Path, ...] = _flag(
        (),
        RUN,
        "files of plain text (UTF-8): with each evaluation, measure what the adapter does to them, "
        "and log perplexities, KL and agreement (cognition/*)",
    )
    attention_shares: int | None = _flag(
        None,
        RUN,
        "with each evaluation, measure which share of the attention goes to the adapter prompt, "
        "the video and the text, on N questions of its split (attention/*)",
    )
    split: Literal["val", "test"] = _flag(
        "val", RUN, "split to evaluate; test is also that of the epochs where there is no val"
    )
    max_steps: int | None = _flag(
        None,
        RUN,
        "evaluate, save and stop after N optimizer steps; the schedule still spans --epochs",
    )
    allow_change: str | None = _flag(
        None,
        RUN,
        "comma-separated settings, 'data', 'backbone' or 'tokenizer', that may differ from the "
        "checkpoint's run",
    )
    verify: bool = _flag(False, RUN, "read all inputs again, whatever is remembered of them")
    seed: int = _flag(
        0, RUN, "seed of the question order, the caption crops and the initial trainables"
    )

    save_steps: int | None = _flag(
        None,
        LOGS,
        "save a checkpoint every N steps as well (default, or 0: at the end of each epoch only)",
    )
    save_total_limit: int | None = _flag(
        None,
        LOGS,
        "keep only the newest N checkpoint-STEP folders (default, or 0: all); checkpoint_best "
        "always stays",
    )
    save_legacy: bool = _flag(
        False,
        LOGS,
        "also write the best weights as checkpoint_best.pth, in the format of the published code",
    )
    logging_steps: int | None = _flag(
        None,
        LOGS,
        "a point of the curves and a line of progress every N steps (default: a point for each "
        "step, a line every 20 s); steps.jsonl has every step",
    )
    report_to: str = _flag(
        "tensorboard",
        LOGS,
        "where curves go: tensorboard, wandb, trackio (with commas between), none, or all that are "
        "installed; wandb and trackio are extras",
    )

    deepspeed: str = _flag(
        "auto",
        RANKS,
        "zero2, zero3, zero3_nodes or zero3_offload (files of ds_configs/), or the path of a "
        "DeepSpeed config; auto: the plan of `vico plan` for this model and these GPUs (without a "
        "GPU: zero2)",
    )
    collective_timeout: float = _flag(
        30.0,
        RANKS,
        "minutes that a rank waits for the others, at the start and in every collective, before "
        "it aborts",
    )
    hang_timeout: float = _flag(
        20.0,
        RANKS,
        "abort if any rank makes no progress (a micro-batch, an evaluation batch, a save) for "
        "this many minutes",
    )
    expect_world_size: int | None = _flag(
        None,
        RANKS,
        "refuse to start unless there are exactly N ranks; takes precedence over SLURM's "
        "variables and the number of visible GPUs",
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            kind, _ = value_type(item.type)
            if kind in (int, float):
                least, most, allowed = BOUNDS.get(item.name, COUNT)
                value = getattr(self, item.name)
                self._require(value is None or least <= value <= most, item.name, allowed)
                object.__setattr__(self, item.name, unless_off(item.name, value))
        reporters = [name.strip() for name in self.report_to.split(",")]
        is_valid = reporters in (["none"], ["all"]) or set(reporters) <= set(REPORTERS)
        self._require(is_valid, "report_to", f"none, all, or some of {', '.join(REPORTERS)}")
        reads_both = self.cap > 0 and not self.no_eval
        is_valid = reads_both or self.eval_captions is None
        self._require(is_valid, "eval_captions", "left out with --no_eval or --cap 0")
        is_valid = not self.no_eval or self.attention_shares is None
        self._require(is_valid, "attention_shares", "left out with --no_eval")
        used = not self.text or bool(self.keep) or not self.no_eval
        self._require(used, "text", "left out with --no_eval and without --keep")
        self._require(bool(self.text) or not self.keep, "keep", "given together with --text FILE")
        for i, path in enumerate(self.text):
            if path in self.text[:i]:
                raise UserError(f"--text: {path} is there twice; name each file once")
        slots_fit = self.max_feats < self.max_seq_len
        self._require(slots_fit, "max_feats", f"below --max_seq_len {self.max_seq_len}")
        recomputed = self.checkpoint_activations
        # The length comes first: int() refuses thousands of digits.
        is_count = len(recomputed) < 10 and recomputed.isdecimal()
        is_valid = recomputed in ("none", "full") or is_count
        self._require(is_valid, "checkpoint_activations", "none, full or a number of layers")
        known = (*(field.name for field in dataclasses.fields(self)), *FINGERPRINTED)
        for name in self.allowed_changes:
            if name not in known:
                hint = nearest(name, known)
                raise UserError(f"--allow_change {name}: no such setting{hint}")
        for name in self.dataset_names:
            self.captions_of(name)  # all are well formed
            self.features_of(name)

    def _require(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            value = plain(getattr(self, name))
            shown = " ".join(value) if isinstance(value, list) else value
            raise UserError(f"--{name} {shown}: must be {allowed}")

    @property
    def only_evaluates(self) -> bool:
        """Whether `vico train` scores --resume and trains nothing."""
        return self.init_eval and self.resume is not None

    @property
    def num_checkpointed(self) -> int | None:
        """How many layers run again in backward; None: all."""
        if self.checkpoint_activations == "full":
            return None
        return 0 if self.checkpoint_activations == "none" else int(self.checkpoint_activations)

    @property
    def allowed_changes(self) -> tuple[str, ...]:
        names = (name.strip() for name in (self.allow_change or "").split(","))
        return tuple(name for name in names if name)

    @property
    def model_folder(self) -> Path:
        """Where --model leads."""
        return folders.model_folder(self.llama_model_path, self.model)

    @property
    def tokenizer_folder(self) -> Path:
        """Of the tokenizer that several models share; a model may have its own."""
        return folders.tokenizer_folder(self.llama_model_path, self.model_folder)

    @property
    def datasets(self) -> tuple[DatasetChoice, ...]:
        """The data sets that --dataset names, with their weights."""
        return parse_datasets(self.dataset)

    @property
    def dataset_names(self) -> tuple[str, ...]:
        return dataset_names(self.dataset)

    def folder_of(self, name: str) -> Path:
        """The folder of a data set."""
        return self.data_path / name

    def captions_of(self, name: str) -> Path | None:
        """What --captions names for a data set."""
        return paths_by_dataset("captions", self.captions, self.dataset_names).get(name)

    def features_of(self, name: str) -> Path | None:
        """What --features names for a data set."""
        return paths_by_dataset("features", self.features, self.dataset_names).get(name)

    def label(self, dataset: str, split: str) -> str:
        """What messages call a split of a data set."""
        return split if len(self.datasets) == 1 else f"{dataset} {split}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Objectives of this run, in the order of all per-task values."""
        return tasks_of(vars(self))

    @property
    def task_weights(self) -> tuple[float, ...]:
        """The value of each task's flag; a switch means 1."""
        return tuple(1.0 if task == "vqa" else float(getattr(self, task)) for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """All settings as plain values."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def tasks_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Each flag of the group OBJECTIVE stands for the task of its name."""
    flags = [f for f in dataclasses.fields(RunConfig) if f.metadata["group"] == OBJECTIVE]
    return ("vqa", *(f.name for f in flags if settings.get(f.name, f.default)))
