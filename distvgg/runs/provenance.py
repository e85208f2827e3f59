"""What numbers were measured on and by: hardware, versions, commit. Imports no torch until asked
for a device."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


PACKAGES = ("distvgg", "torch", "torchvision", "accelerate", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return "not installed"


def hardware(device: "torch.device") -> str:
    """A device in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name: Any = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) a process"


def machine(device: "torch.device") -> dict[str, str]:
    """The kind of device, with the instruction set that kernels are chosen for, and versions: what
    the rounding of a run depends on beside its config."""
    import torch

    if device.type == "cuda":
        cudnn = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        found = {"device": torch.cuda.get_device_name(device)} | versions()
        return found | {"cuda": str(torch.version.cuda), "cudnn": cudnn}
    name = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return {"device": f"{name} ({torch.backends.cpu.get_cpu_capability()})"} | versions()


def commit() -> str | None:
    """The commit of a checkout that the package runs from, `-dirty` where the package differs from
    it; None for an installed package."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # not some other project's checkout around us
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
