"""The distvgg command line with one micro-batch that goes wrong: in step 9 (counted from 1), the
last but one. `POISON=loss` makes its images nan; `POISON=gradient` leaves its loss and spoils only
what comes back."""

import os
import sys

import torch

from distvgg.cli import main
from distvgg.data import loader
from distvgg.rng import derive_seed
from distvgg.training import step

STEP, MICRO_BATCH = 9, 2
_sound_batches, _sound_loss = loader.DeviceLoader.micro_batches, step.summed_loss


def micro_batches(self: loader.DeviceLoader, step: int) -> list[loader.MicroBatch]:
    return [
        b._replace(images=b.images * torch.nan) if (step + 1, b.k) == (STEP, MICRO_BATCH) else b
        for b in _sound_batches(self, step)
    ]


SEED = derive_seed(0, "dropout", STEP - 1, MICRO_BATCH)


def summed_loss(logits: torch.Tensor, batch: loader.MicroBatch, smoothing: float) -> torch.Tensor:
    loss = _sound_loss(logits, batch, smoothing)
    if batch.dropout_seed == SEED:
        zero = logits.sum() * 0
        loss = loss + torch.sqrt(zero)  # whose derivative at zero is infinite, times zero: nan
    return loss


if __name__ == "__main__":
    if os.environ["POISON"] == "loss":
        loader.DeviceLoader.micro_batches = micro_batches  # type: ignore[method-assign]
    else:
        step.summed_loss = summed_loss
    sys.exit(main())
