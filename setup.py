"""Package metadata; build system and tools are configured in pyproject.toml, exact versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

GGUF = ["gguf", "accelerate"]  # transformers reads such files with accelerate alone: `convert --verify`
VISION = ["timm", "torchvision", "datasets", "faster-coco-eval", "onnx", "onnxruntime", "onnxscript"]

setup(
    name="megatron-ext",
    version="0.1.0",
    description="Compress and train Transformer, Mamba-2 and hybrid language models on Megatron-Core",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["megatron", "pruning", "distillation", "mamba", "model compression"],
    packages=find_packages(include=["megatron_ext", "megatron_ext.*"]),
    package_data={"megatron_ext": ["py.typed"]},
    entry_points={"console_scripts": ["megatron-ext = megatron_ext.cli:main"]},
    install_requires=[
        "megatron-core==0.19.2",
        # Those that the tests ran with: the platform replaces names inside of torch, and transformers is the oracle.
        "torch>=2.11,<2.12",
        "transformers>=5.23,<5.24",
        "argcomplete",
        "numpy",
        "einops",
        "huggingface-hub",
        "jaxtyping",
        "matplotlib",
        "psutil",  # megatron-core's checkpoints import it without declaring it
        "pyyaml",
        "rich",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "xxhash",
    ],
    extras_require={
        # Torchvision belongs to one version of torch, onnxscript to one of its exporter.
        "vision": VISION,
        # The kernels that benchmarks/results were measured beside; they compile against the torch that is here.
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<3", "mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0"],
        "eval": ["lm-eval"],
        "wandb": ["wandb"],
        "gguf": GGUF,
        "dev": [
            *GGUF,
            *VISION,
            "beartype",
            "hypothesis",
            "import-linter",
            "lm-eval",
            "pyright[nodejs]",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
    },
)
