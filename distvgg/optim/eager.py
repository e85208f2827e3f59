"""torch's optimizers without the import of torch.compile's front end.

torch.optim imports torch._dynamo, 0.8 s of CPU at each start, to exempt its methods from
compilation (torch 2.8 to 2.14, `torch/_compile.py`). Nothing here compiles an optimizer.

Invariant: the methods are torch's own, without the decorators that import it.
"""

import inspect

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """Base of optimizers that are never compiled."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class SGD(EagerOptimizer, torch.optim.SGD):
    """`torch.optim.SGD`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
