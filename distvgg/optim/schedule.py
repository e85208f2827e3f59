"""The learning rate as a pure function of the step.

The learning rate is computed, not advanced. No scheduler has a state to save, or is stepped once
per process.
"""

import math

from distvgg.config import OptimConfig


def lr_at(step: int, config: OptimConfig, steps: int, warmup_steps: int) -> float:
    """Returns the learning rate of a step, counted from 0, in a run of `steps`.

    A linear warm-up over `warmup_steps` reaches the peak at its last step. Cosine decay (Loshchilov
    and Hutter, 2017, equation 5) or linear decay towards 0 at `steps` follows, or a constant rate,
    or one that each quarter of the remaining steps divides by ten.
    """
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "step": 0.1 ** math.floor(4 * progress),
    }
    return config.lr * decay[config.schedule]
