"""Installs the package `pipelines`, its configuration, and the versions of the engine that fit together."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIREMENTS = [
    # The engine. One set: NeMo 2.7 is the last release with nemo.collections.llm, and runs with this Megatron-Core.
    "nemo_toolkit[lightning]==2.7.3",
    "megatron-core==0.15.3",  # 0.16 has no no_weight_decay_cond in get_megatron_optimizer, which this NeMo passes
    "nvidia-modelopt==0.37.0",  # imported by nemo.collections.llm; the release of this NeMo's generation
    # In the same command as all the rest: left alone pip takes the newest torch and gigabytes of CUDA.
    "torch==2.13.0",
    # What nemo.collections.llm imports without declaring it.
    "nemo-run==0.7.0",  # 0.11 calls a leptonai interface that no release has
    "leptonai==0.27.3",
    "nvidia-resiliency-ext==0.4.1",  # NeMoLogger imports it
    "tensorstore==0.1.86; python_version >= '3.11'",  # Megatron's checkpoint reader
    "tensorstore==0.1.78; python_version < '3.11'",  # the last for 3.10
    "einops==0.8.2",
    "sentencepiece==0.2.3",
    "tiktoken==0.14.0",
    # Held back together: newer datasets want pyarrow 21, which wants numpy 2, which this NeMo does not take.
    "datasets<4",
    "pyarrow<20",
    "numpy<2",
    # Ours.
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "safetensors==0.8.0",
    "huggingface_hub==0.36.2",  # transformers 4 wants one below 1.0
    "tensorboard==2.20.0",
    "matplotlib==3.10.9",
    "Jinja2==3.1.6",
    "rich==15.0.0",
    "PyYAML==6.0.3",
]
TRACKERS = [
    "wandb==0.31.0",
    "mlflow-skinny==3.17.2",
    # What MLflow's client needs to keep its runs in a file.
    "SQLAlchemy==2.0.58",  # 2.1 is for Python 3.11 and later
    "alembic==1.20.1",
]
# For export.quantize. Its files are safetensors that the transformers above opens and vLLM, whose format it is. Left
# out: nvidia-modelopt and quanto write no INT8 that this transformers opens, torchao and bitsandbytes save INT8 weights
# as pickles or for GPUs. 0.12.2 to 0.14.0 write the same files; 0.15 has another interface to its compressors.
QUANTIZE = ["compressed-tensors==0.13.0"]
TASKS = [
    # Not among the requirements: only the scores of tasks need it, and it brings twenty packages.
    "lm-eval[hf]==0.4.13",
]
TEST = [
    *TRACKERS,
    *QUANTIZE,
    *TASKS,
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",  # test files side by side: most of the time of one process goes by waiting
    "ruff==0.17.6",
    "mypy==2.4.1",
    # To try the GPU's kernels in its interpreter and its compiler. Not among the requirements: a CUDA build of torch
    # brings its own. This is the one that those of the torch above ask for, so that pip can install both.
    "triton==3.7.1; platform_system == 'Linux'",
]

setup(
    name="stillhouse",
    version="0.1.0",
    description="Prune and distil Llama-class language models under tensor parallelism, with NeMo and Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",  # the range of this NeMo and this numpy
    packages=[*find_packages(include=["pipelines", "pipelines.*"]), "pipelines.conf"],
    package_dir={"pipelines.conf": "conf"},
    package_data={
        "pipelines.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
        "pipelines.report": ["*.jinja", "*.css"],
        "pipelines.cluster": ["*.sh"],
        "pipelines.evaluation": ["*.jsonl", "*.txt"],
    },
    install_requires=REQUIREMENTS,
    extras_require={"trackers": TRACKERS, "quantize": QUANTIZE, "tasks": TASKS, "test": TEST, "dev": TEST},
    entry_points={"console_scripts": ["stillhouse = pipelines.__main__:main"]},
)
