"""One rank of many that sum vectors along the tree, several at a time: says whether each sum is, to
the last bit, the one by definition."""

import sys

import torch
from accelerate import Accelerator

from distvgg.distributed.reduction_plan import Ranks, TreePlan
from distvgg.distributed.tree_sum import ExchangeQueue, TreeSum
from tree_sums import by_definition, some_leaves

LEVELS = {1: [()], 2: [(2,)], 3: [(3,)], 4: [(4,), (2, 2)], 6: [(6,), (2, 3), (3, 2)]}


def main() -> None:
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    queue = ExchangeQueue(accelerator.device)
    for levels in LEVELS[world_size]:
        plans = [TreePlan(12 * a, Ranks(rank, world_size, levels)) for a in (1, 5, 8)]
        cases = [
            (p, size, t) for p in plans for size, t in ((3, torch.float64), (5000, torch.float32))
        ]
        sums = [TreeSum(p, [torch.empty(size)], t) for p, size, t in cases]
        for _ in range(2):
            for (p, size, t), total in zip(cases, sums, strict=True):
                for k in p.leaves(rank):
                    total.add([some_leaves(p.n, size, t)[k]])
                queue.start(total.exchange())
            queue.finish()
            for (p, size, t), total in zip(cases, sums, strict=True):
                expected = by_definition(some_leaves(p.n, size, t))
                assert torch.equal(total.total[0], expected), (levels, p, size)
    accelerator.end_training()
    sys.stdout.write("equal\n")  # in one piece: ranks share a pipe


if __name__ == "__main__":
    main()
