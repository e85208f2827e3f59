"""One rank of many that receive bytes of the main process: says whether they are equal."""

import sys

from accelerate import Accelerator

from distvgg.distributed import collectives


def main() -> None:
    collectives._BROADCAST_BYTES = 1000
    accelerator = Accelerator(cpu=True)
    for size in (1, 999, 1000, 1001, 12345):
        sent = bytes(i * 31 % 256 for i in range(size))
        here = sent if accelerator.is_main_process else None
        assert collectives.broadcast_bytes(accelerator, here) == sent, size
    accelerator.end_training()
    sys.stdout.write("equal\n")  # in one piece: ranks share a pipe


if __name__ == "__main__":
    main()
