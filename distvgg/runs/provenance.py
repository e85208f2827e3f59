"""Provenance of measured numbers: hardware, versions, commit.

Only the functions that take a device import torch.
"""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from distvgg.cores import describe_cores
from distvgg.wording import counted

if TYPE_CHECKING:
    import torch


PACKAGES = ("distvgg", "torch", "torchvision", "accelerate", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return "not installed"


def processor() -> tuple[str, frozenset[str]]:
    """Returns the processor's name and its flags, such as avx512_bf16, as Linux has them."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    return (
        name[1].strip() if name else platform.processor() or platform.machine(),
        frozenset(flags[1].split()) if flags else frozenset(),
    )


def hardware(device: "torch.device") -> str:
    """Describes a device as text."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()[0]}, {describe_cores()}, {counted(threads, 'thread')} a process"


def machine(device: "torch.device") -> dict[str, str]:
    """Returns the device and the versions that rounding depends on, in addition to the config.

    For a CPU, the device includes the instruction set that kernels are chosen for.
    """
    import torch

    if device.type == "cuda":
        cudnn = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        found = {"device": torch.cuda.get_device_name(device)} | versions()
        return found | {"cuda": str(torch.version.cuda), "cudnn": cudnn}
    return {"device": f"{processor()[0]} ({torch.backends.cpu.get_cpu_capability()})"} | versions()


def commit() -> str | None:
    """Returns the commit of the checkout that the package runs from.

    The suffix `-dirty` means that the package differs from the commit. None for an installed
    package.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # Fails if the checkout around an installed package is another project's.
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
