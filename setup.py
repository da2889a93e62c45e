"""ViCo's dependencies, and the reason for each bound.

launch/constraints.txt has the exact versions of a tested environment. launch/*.sh run the package
of their checkout, installed or not. `pip install .` installs the command `vico` alone, with
ds_configs/ as files of the package; the scripts, recipes and tests stay in the checkout.
"""

from setuptools import find_packages, setup

LLAMA_3 = [
    "tiktoken>=0.9,<1",  # Meta's tokenizer.model of LLaMA-3
    "tokenizers>=0.21,<1",  # Hugging Face's tokenizer.json
]
QUANTIZED = [
    # For --quantize, on GPUs and CPUs. Other 0.x versions may quantize a weight differently.
    "bitsandbytes>=0.50,<0.51",
]

DATA = [
    "h5py>=3.12,<4",  # features in one .h5
    # Tables in parquet. 2.3 is the last version for Python 3.10.
    "pandas>=2.2,<4",
    "pyarrow>=18",
]
# Curves of --report_to. Both write to the local disk without a network.
WANDB = ["wandb>=0.20,<1"]
TRACKIO = ["trackio>=0.20,<1"]
TRANSFORMERS = "transformers>=5.20,<6"
# Videos to features. 17.1 is the last version for Python 3.10. 19 is untested.
VIDEO = ["av>=17,<19", TRANSFORMERS]
# BLEU, ROUGE-L and CIDEr of captions. The first imports the second.
CAPTIONS = ["pycocoevalcap>=1.2,<2", "pycocotools>=2.0.8,<3"]
# The charts of `vico report`, drawn in the browser by a script inside the page.
REPORT = ["plotly>=6,<8"]
# Tasks of `vico cognition --tasks`. vico/train/language_tasks.py builds on its model class.
LM_EVAL = ["lm-eval>=0.4.13,<0.5"]

setup(
    name="vico",
    version="0.1.0",
    description="Video question answering on a frozen LLaMA, trained with DeepSpeed",
    packages=[*find_packages(include=["vico", "vico.*"]), "vico.ds_configs"],
    package_dir={"vico.ds_configs": "ds_configs"},
    package_data={"vico.ds_configs": ["*.json"], "vico.report": ["*.html", "*.css", "*.js"]},
    python_requires=">=3.10",
    install_requires=[
        # From 2.11 varlen_attn has the signature that ViCo calls (2.12 changed it: both work).
        # From 2.10 weights_only loading has no known vulnerability. 2.14 is untested.
        "torch>=2.11,<2.14",
        # Pinned: vico/train/engine.py relies on how this version scales gradients, partitions
        # parameters and lays out its state. Before 0.19.6 mixed dtypes with frozen parameters were
        # wrong under ZeRO-3.
        "deepspeed==0.19.8",
        # The tokens of a text are stable within 0.2. 0.2.3 adds their offsets. 0.3 is untested.
        "sentencepiece>=0.2.3,<0.3",
        # Reads and writes checkpoints. The file format has been stable since 0.4.
        "safetensors>=0.4,<1",
        # numpy 1 is untested. 2.2 is the last version for Python 3.10.
        "numpy>=2.1,<3",
        # Writes the curves that `tensorboard --logdir` shows.
        "tensorboard>=2.16,<3",
        # Reads recipes, by safe_load.
        "pyyaml>=6,<7",
        # Finds a launcher's ranks, to forward signals. DeepSpeed needs it too.
        "psutil>=6,<8",
        # The progress bar on a terminal.
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # Source only: needs nvcc and `pip install --no-build-isolation`. Without it torch's
        # own kernels run.
        "flash": ["flash-attn>=2.8,<3"],
        "llama3": LLAMA_3,
        "quantized": QUANTIZED,
        "data": DATA,
        "wandb": WANDB,
        "trackio": TRACKIO,
        "video": VIDEO,
        "captions": CAPTIONS,
        "report": REPORT,
        "lm-eval": LM_EVAL,
        # The plots of `bash benchmarks/run.sh report`.
        "benchmarks": ["matplotlib>=3.9,<4"],
        "dev": [
            *LLAMA_3,
            *QUANTIZED,
            *DATA,
            *WANDB,
            *TRACKIO,
            *VIDEO,  # transformers is also the reference for the backbone's logits
            *CAPTIONS,
            *REPORT,
            *LM_EVAL,
            "imageio-ffmpeg>=0.6,<1",  # the ffmpeg command, the reference for decoded frames
            "playwright>=1.50,<2",  # opens the report's page in a Chromium that is there
            "peft>=0.17,<1",  # its reader opens what `vico export` writes
            # Its interpreter runs the GPU kernels in tests without a GPU. With one torch has it.
            "triton>=3.6,<4; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "gguf>=0.17,<1",  # the format of the small LLaMA that slow tests use
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",  # two processes share the tests
            "hypothesis>=6.100,<7",
            "ruff==0.17.6",  # pinned: the formatter's output changes between versions
            "mypy==2.4.1",  # pinned: so do the checker's findings
            "matplotlib>=3.9,<4",  # as in the extra "benchmarks"
        ],
    },
    entry_points={"console_scripts": ["vico=vico.cli.main:console"]},
)
