"""Make mamba-ssm's and causal-conv1d's kernels importable for the benchmarks, in a minute and for this GPU alone.

    python benchmarks/peers.py --out DIR mamba_ssm-2.3.2.post1.tar.gz causal_conv1d-1.7.0.tar.gz
    PYTHONPATH=DIR python benchmarks/ssm_gpu.py

`pip install mamba-ssm causal-conv1d` is the same for the benchmarks, and compiles the selective scan of Mamba-1, which
they do not need, and every GPU's code: half an hour. Here the source distributions are unpacked, one extension
(`causal_conv1d_cuda`) is compiled for one architecture, and mamba_ssm's `__init__` imports nothing, because what it
imports needs the other extension. The kernels that are timed are theirs to the letter.
"""

import argparse
import os
import re
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGES = ("mamba_ssm", "causal_conv1d")
HALF = ("HALF", "BFLOAT16", "BFLOAT162")
# As causal-conv1d's own setup.py has them.
CUDA_FLAGS = [
    "-O3", *(f"-U__CUDA_NO_{kind}_{what}__" for kind in HALF for what in ("OPERATORS", "CONVERSIONS")),
    "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math",
]  # fmt: skip


def unpack(archive: Path, folder: Path) -> str:
    """Unpack what a source distribution installs, and its metadata; the name of its package.

    Raises:
        SystemExit: It is none of the packages.
    """
    match = re.fullmatch(r"([a-z0-9_]+)-([\w.]+)\.tar\.gz", archive.name.replace("-ssm", "_ssm"))
    if match is None or match[1] not in PACKAGES:
        raise SystemExit(f"{archive}: not a source distribution of {' or '.join(PACKAGES)}")
    name, version = match.groups()
    with tempfile.TemporaryDirectory() as unpacked, tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
        root = next(Path(unpacked).iterdir())
        for part in (name, "csrc"):
            if part == name or name == "causal_conv1d":
                (root / part).rename(folder / part)
    if name == "mamba_ssm":
        (folder / name / "__init__.py").write_text(f'__version__ = "{version}"\n')
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return name


def compile_convolution(folder: Path) -> None:
    """Compile `causal_conv1d_cuda` for the GPU that is here."""
    import torch
    from torch.utils.cpp_extension import load

    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    source = folder / "csrc"
    files = [source / "causal_conv1d.cpp", *sorted(source.glob("*.cu"))]
    load(
        "causal_conv1d_cuda", [str(file) for file in files], extra_cuda_cflags=CUDA_FLAGS,
        extra_include_paths=[str(source)], build_directory=str(folder), verbose=True,
    )  # fmt: skip


def main() -> None:
    """Unpack, compile, say how they are used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path, nargs="+", help="source distributions of mamba-ssm and causal-conv1d")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    if "causal_conv1d" in [unpack(archive, args.out) for archive in args.archives]:
        compile_convolution(args.out)
    print(f"PYTHONPATH={args.out.resolve()} {sys.executable} benchmarks/ssm_gpu.py")


if __name__ == "__main__":
    main()
