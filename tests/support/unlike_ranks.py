"""`distvgg train` on ranks whose processors differ: only rank 0's is fast at bf16. Prints how often
each rank listed the data's files and looked for the stop file."""

import os
import sys

from distvgg import preemption
from distvgg.cli import main
from distvgg.data import cache
from distvgg.distributed import device

RANK = int(os.environ["RANK"])
counts = {"listings": 0, "looks": 0}
list_files, exists = cache._fingerprint, os.path.exists


def counted_listing(config: object) -> str:
    counts["listings"] += 1
    return list_files(config)


def counted_look(path: object) -> bool:
    counts["looks"] += os.path.basename(path) == "STOP"
    return exists(path)


if __name__ == "__main__":
    device.processor = lambda: ("a processor", frozenset({"avx512_bf16"} if RANK == 0 else ()))
    cache._fingerprint, os.path.exists = counted_listing, counted_look
    preemption.LOOK_EVERY = 0.0
    code = main()
    sys.stdout.write(f"rank {RANK}: {counts['listings']} listings, {counts['looks']} looks\n")
    sys.exit(code)
