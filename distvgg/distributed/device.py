"""The device of this process, and the precision at which the device is fast."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from distvgg import environment
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.runs.provenance import processor

if TYPE_CHECKING:
    from accelerate import Accelerator


def device_here() -> torch.device:
    """Returns the device that accelerate uses for one process, without importing accelerate."""
    with warnings.catch_warnings(action="ignore"):  # torch warns if the driver is too old
        found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or environment.is_on("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return found


def has_nvidia_hardware(root: Path = Path("/")) -> bool:
    """Returns True if this machine has an NVIDIA GPU, regardless of installed software (Linux)."""
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        is_display = vendor.with_name("class").read_text().startswith("0x03")
        if is_display and vendor.read_text().strip() == "0x10de":
            return True
    return (root / "dev/nvidiactl").exists()


def resolve_precision(precision: str, device: torch.device, launched: str | None = None) -> str:
    """Returns the precision that `auto` means on a device; checks and returns any other value.

    Args:
        precision: the value in the config.
        device: the device of this process.
        launched: the value of `accelerate launch --mixed_precision`. fp16 and bf16 override the
            device's own precision. `no` is ignored, because it is also the launcher's default.

    Raises:
        UserError: fp16 was requested without a CUDA GPU.
    """
    if precision == "auto" and launched in ("fp16", "bf16"):
        precision = launched
    if precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"train.precision fp16 needs a CUDA GPU, this is {device.type}: take bf16, no or auto"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        # Emulated bf16 (before Ampere) is slower than fp32.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        _, flags = processor()
        return "no" if flags.isdisjoint({"avx512_bf16", "amx_bf16"}) else "bf16"
    return "no"


def place(model: nn.Module, accelerator: "Accelerator", config: Config) -> None:
    """Moves a model to this process's device, in the memory format of the config."""
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model.to(accelerator.device)
    model.to(memory_format=layout)
