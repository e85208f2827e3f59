"""The learning rate as a pure function of the step.

It is computed, not advanced, so that no scheduler has a state to save or is stepped once per
process.
"""

import math

from distvgg.config import OptimConfig


def lr_at(step: int, config: OptimConfig, steps: int, warmup_steps: int) -> float:
    """The learning rate of the step with this number (from 0) in a run of `steps`.

    Linear warm-up over `warmup_steps`, whose last step has the peak; then cosine decay
    (Loshchilov and Hutter, 2017, equation 5), linear decay, or none, towards 0 at `steps`.
    """
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return config.lr * decay[config.schedule]
