"""Assignment of tasks to ranks."""

from collections.abc import Sequence


def greedy_partition(costs: Sequence[float], ranks: int) -> list[int]:
    """Returns the rank of each task.

    The assignment is greedy: the costliest remaining task goes to the rank with the least load.
    """
    load, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=lambda rank: load[rank])
        load[owners[i]] += costs[i]
    return owners
