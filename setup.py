"""Onecurve's package: `trainer`, with its configurations as `trainer.configs`."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
configs = [str(path.relative_to(here / "configs")) for path in (here / "configs").rglob("*.yaml")]

setup(
    name="onecurve",
    version="0.1.0",
    description="One loop, one checkpoint and one loss curve on any number of ranks: distributed LLM training",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["trainer", "trainer.*"]), "trainer.configs"],
    package_dir={"trainer.configs": "configs"},
    package_data={
        "trainer": ["py.typed"],
        "trainer.cli": ["slurm.sbatch"],
        "trainer.report": ["charts.yaml", "page.css", "page.js"],
        "trainer.configs": configs,
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "datasets>=4.0",
        "jinja2>=3.1",
        "wandb>=0.20",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "httpx>=0.27",
        "numpy>=1.26",
        "pyarrow>=17",
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.17",
        "zstandard>=0.22",
        "psutil>=5.9",
    ],
    extras_require={
        "dev": [
            "accelerate>=1.5",
            "bitsandbytes>=0.50,<0.51",
            "build>=1.2",
            "compressed-tensors>=0.15",
            "gguf>=0.16",
            "hydra-optuna-sweeper>=1.3,<1.4",
            "hydra-submitit-launcher>=1.2,<1.3",
            "hypothesis>=6.100",
            "mypy>=1.15",
            "peft>=0.15",
            "pre-commit>=4",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "transformers>=5.0",
            "types-PyYAML",
            "xllamacpp>=2026.10",
        ],
        "convert": ["gguf>=0.16"],
        "gguf": ["gguf>=0.16", "xllamacpp>=2026.10"],
        "quant": ["bitsandbytes>=0.50,<0.51"],
        "sweep": ["hydra-submitit-launcher>=1.2,<1.3", "hydra-optuna-sweeper>=1.3,<1.4"],
        "vllm": ["vllm>=0.32"],
    },
    entry_points={"console_scripts": ["onecurve=trainer.cli:main"]},
)
