"""The distvgg command line in float64, for tests that compare runs beyond float32's rounding."""

import sys

import torch

from distvgg.cli import main

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    sys.exit(main())
