"""The device of this process, and the precision that it is fast at."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from distvgg.config import Config
from distvgg.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def device_here() -> torch.device:
    """The device that accelerate takes for one process, found without joining a group."""
    from accelerate.utils import parse_flag_from_env

    with warnings.catch_warnings(action="ignore"):  # of a driver that is too old
        found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return found


def has_nvidia_hardware(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU, whatever the software knows of it (Linux)."""
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        is_display = vendor.with_name("class").read_text().startswith("0x03")
        if is_display and vendor.read_text().strip() == "0x10de":
            return True
    return (root / "dev/nvidiactl").exists()


def resolve_precision(precision: str, device: torch.device, launched: str | None = None) -> str:
    """What `auto` means on a device; anything else is checked and returned.

    Args:
        launched: what `accelerate launch --mixed_precision` said. It wins over what the device is
            good at, but its `no` is also its default, and says nothing.

    Raises:
        UserError: fp16 without a GPU.
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
        has = torch.cpu.get_capabilities()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "no"
    return "no"


def place(model: nn.Module, accelerator: "Accelerator", config: Config) -> None:
    """Moves a model to this process's device, in the memory order of the config."""
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model.to(accelerator.device)
    model.to(memory_format=layout)
