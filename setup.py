"""What ViCo stands on, and why each bound is what it is. Exact versions of a tested environment: launch/constraints.txt.

The checkout is where ViCo runs from (ds_configs/ and launch/ lie beside the package): install it with `pip install -e .`,
or not at all, launch/*.sh find it either way.
"""

from setuptools import find_packages, setup

LLAMA_3 = [
    "tiktoken>=0.9,<1",  # Meta's tokenizer.model of LLaMA-3
    "tokenizers>=0.21,<1",  # Hugging Face's tokenizer.json
]
QUANTIZED = [
    "bitsandbytes>=0.50,<0.51",  # --quantize: packs and unpacks on GPUs and CPUs; what its 0.x versions make of a weight may differ
]

setup(
    name="vico",
    version="0.1.0",
    description="Video question answering on a frozen LLaMA, trained with DeepSpeed",
    packages=find_packages(include=["vico", "vico.*"]),
    python_requires=">=3.10",
    install_requires=[
        # From 2.11 varlen_attn has the signature that is used here (it changed in 2.11 and 2.12, both are known);
        # from 2.10 weights_only loading has no known hole. 2.14 is untried.
        "torch>=2.11,<2.14",
        # Exactly: engine.py relies on how this version scales gradients, scatters parameters and lays out its state.
        # Nothing before 0.19.6: mixed dtypes with frozen parameters under ZeRO-3 were wrong.
        "deepspeed==0.19.8",
        # Tokens of a text do not change within 0.2; 0.2.3 gives their offsets in the text. 0.3 is untried.
        "sentencepiece>=0.2.3,<0.3",
        # Reads and writes adapters; the file format has been stable since 0.4.
        "safetensors>=0.4,<1",
        # numpy 1 is untried. Python 3.10 ends with 2.2.
        "numpy>=2.1,<3",
        # Writes the curves; `tensorboard --logdir` shows them.
        "tensorboard>=2.16,<3",
        # safe_load of recipes.
        "pyyaml>=6,<7",
        # Who a launcher's ranks are, to pass signals on to them. DeepSpeed brings it too.
        "psutil>=6,<8",
        # The bar on a terminal.
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # Source only: needs nvcc and `pip install --no-build-isolation`. Without it torch's own kernels run.
        "flash": ["flash-attn>=2.8,<3"],
        "llama3": LLAMA_3,
        "quantized": QUANTIZED,
        # The plots of `bash benchmarks/run.sh report`.
        "benchmarks": ["matplotlib>=3.9,<4"],
        "dev": [
            *LLAMA_3,
            *QUANTIZED,
            "transformers>=5.20,<6",  # what the backbone's logits are held against
            # Its interpreter runs the GPU's kernels in tests without one. With a GPU torch brings its own.
            "triton>=3.6,<4; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "pytest>=9,<10",
            "hypothesis>=6.100,<7",
            "ruff==0.17.6",  # exactly: the formatter's taste changes between versions
            "mypy==2.4.1",  # exactly: so do the checker's findings
            "matplotlib>=3.9,<4",  # as the extra benchmarks
        ],
    },
    entry_points={"console_scripts": ["vico=vico.cli.main:console"]},
)
