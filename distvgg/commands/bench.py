"""`distvgg bench`: predicted throughput of more GPUs, from the step time of one.

Owns the measurement of the device here, by real steps of the recipe on synthetic images. Owns the
text and tables around the model of `cost_model.py`. Invariant: each number is marked as measured
here, given, or assumed.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distvgg import environment
from distvgg.commands.bench_options import BenchOptions, assumption, gpu_spec, interconnect
from distvgg.commands.text_tables import plain_table
from distvgg.config import Config
from distvgg.distributed.cost_model import (
    TARGET,
    Gpu,
    Job,
    Layer,
    Setup,
    Step,
    efficiency,
    smallest_batch,
    step,
)
from distvgg.distributed.hardware import HARDWARE
from distvgg.errors import UserError
from distvgg.models.freezing import freeze, learned_parameters
from distvgg.models.summary import layers_of, network_name
from distvgg.models.vgg import VGG, FrozenBatchNorm
from distvgg.runs.provenance import commit, hardware, versions
from distvgg.wording import counted

if TYPE_CHECKING:
    from distvgg.training.state import Run


# Micro-batches of the timed steps. The difference of their times gives the time of a micro-batch;
# the rest is the fixed time of a step.
FEW, MANY = 1, 4
SECONDS, BLOCK_SECONDS = 8.0, 0.05
ASKED = (8, 64, 512)
Times = dict[int, list[float]]


def bench(config: Config, recipe: str, options: BenchOptions, *, as_json: bool) -> str:
    """Returns step time, throughput and efficiency on 1 to `max_gpus` GPUs, as tables or JSON.

    Raises:
        UserError: the options contradict each other, or there are several processes.
    """
    if environment.world_size() > 1:
        raise UserError("bench measures one device and computes the rest: start it as one process")
    job, batch = describe_workload(config), config.train
    alone = batch.global_batch_size // batch.micro_batch_size
    if options.gpu is None and options.images_per_sec is None:
        gpu, source = measure(config), "measured"
        if options.jitter is not None:
            gpu = gpu._replace(jitter=options.jitter)
    else:
        gpu, source = (
            gpu_spec(options, job, alone),
            "given" if options.images_per_sec else "assumed",
        )
    setup = Setup(job, gpu, interconnect(options))
    counts = [2**i for i in range(options.max_gpus.bit_length())]
    strong = [step(setup, n, alone // n) for n in counts if alone % n == 0]
    weak = [step(setup, n, alone) for n in counts]
    if as_json:
        return json.dumps(findings(config, recipe, options, source, setup, strong, weak), indent=2)
    model, m = config.model, batch.micro_batch_size
    size = sum(sum(layer.gradients) for layer in job.layers)
    header = ["GPUs", "micro-batches", "batch", "step ms", "exposed", "wait", "images/s", "eff."]
    parts = [
        f"{network_name(model)} of {recipe}: {size / 1e6:.1f} MB of"
        f" gradients, {job.flops / 1e9:.2f} GFLOP an image, micro-batches of {m}\n"
        + "\n".join(origins(setup, options, source, alone)),
        f"Strong scaling: the global batch of {batch.global_batch_size:,} shared by more GPUs\n"
        + plain_table([header, *(cells(setup, s, alone) for s in strong)], "right"),
        f"Weak scaling: {counted(alone, 'micro-batch')} of {m} on each GPU\n"
        + plain_table(
            [
                [*header, f"batch for {TARGET:.0%}"],
                *([*cells(setup, s, alone), batch_words(setup, s.ranks, alone)] for s in weak),
            ],
            "right",
        ),
        "batch: images a step, over all GPUs. exposed: ms of communication that backward does not"
        " hide.\nwait: ms for the slowest GPU. eff.: images/s over those of as many single GPUs."
        f"\nbatch for {TARGET:.0%}: the smallest with that efficiency.",
        "\n".join(expectations(setup, options, batch.global_batch_size, alone)),
    ]
    return "\n\n".join(parts)


def describe_workload(config: Config) -> Job:
    """Returns what a rank computes and sends, counted from the modules of the network.

    The network is on the meta device and has 100 classes, or 10 for CIFAR-10. Operations are
    counted as in `flops.training_flops`: those of convolutions and linear layers.
    """
    classes = 10 if config.data.name == "cifar10" else 100
    with torch.device("meta"):
        model = VGG(config.model, classes)
    freeze(model, config.optim.frozen)
    layers: list[Layer] = []
    statistics_, is_behind = 0, False
    for found in layers_of(config.model, classes):
        module = model.get_submodule(found.name)
        learned = learned_parameters(module)
        gradients = tuple(p.numel() * p.element_size() for p in learned)
        if isinstance(module, nn.Conv2d | nn.Linear):
            if isinstance(module, nn.Linear):
                # The weight is transposed before the product: its gradient follows the bias's.
                gradients = gradients[::-1]
            # No gradient of what is in front of all trained layers, such as the images.
            backward = found.flops * (is_behind + module.weight.requires_grad)
            layers.append(Layer(gradients, found.flops, backward))
        elif isinstance(module, nn.BatchNorm2d):
            # BatchNorm's gradients are ready before those of the convolution in front of it.
            layers[-1] = layers[-1]._replace(gradients=gradients + layers[-1].gradients)
            if not isinstance(module, FrozenBatchNorm):
                statistics_ += 2 * module.num_features
        is_behind = is_behind or bool(learned)
    shared, results = shared_work(model, config)
    return Job(tuple(layers), config.train.micro_batch_size, statistics_, shared, results)


def shared_work(model: nn.Module, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the work that ranks partition in a step: operations and result bytes of each piece.

    The pieces are the matrices that Muon orthogonalises; with another optimizer there are none.
    """
    if config.optim.name != "muon":
        return (), ()
    from distvgg.optim.build import muon_dtype, parameter_groups
    from distvgg.optim.muon import orthogonalise_flops

    groups = parameter_groups(model, config.optim)
    muon = [p for group in groups if group["orthogonalised"] for p in group["params"]]
    steps, size = config.optim.muon_steps, muon_dtype(config.train.precision).itemsize
    flops = tuple(orthogonalise_flops(len(p), p[0].numel(), steps) for p in muon)
    return flops, tuple(size * p.numel() for p in muon)


def measure(config: Config, seconds: float = SECONDS) -> Gpu:
    """Measures the device here, by about `seconds` of real steps of a recipe."""
    from distvgg.training.setup import build

    with TemporaryDirectory() as folder:
        run = build(benchmark_config(config, ranks=1), Path(folder) / "run")
        step_times(run, rounds=1)  # allocation, compilation
        first = step_times(run, rounds=1)
        block = max(1, round(BLOCK_SECONDS / first[FEW][0]))
        one_round = block * sum(times[0] for times in first.values())
        rounds = min(40, max(5, round(seconds / one_round)))
        times = step_times(run, rounds, block)
        shared = shared_seconds(run)
        assert run.lock is not None
        run.lock.release()
        run.accelerator.end_training()
    return fit_gpu(times, block, shared)


def benchmark_config(config: Config, ranks: int) -> Config:
    """Returns a config of the same computation on synthetic images, without trackers.

    A step has `MANY` micro-batches on each rank.
    """
    return config.replace(
        data=Config().data.model_dump() | {"name": "synthetic", "val_size": 1000},
        model__weights=None,
        train__global_batch_size=ranks * MANY * config.train.micro_batch_size,
        track__wandb=False,
        track__tensorboard=False,
        # Of original images, which the synthetic set has not.
        augment__random_resized_crop=0,
        augment__scale_jitter=(),
        eval__crop_ratio=1,
    )


def step_times(
    run: "Run", rounds: int, block: int = 1, lengths: Sequence[int] = (FEW, MANY)
) -> Times:
    """Times training steps of several lengths in turns.

    The learning rate is 0, so that the weights do not change; a step takes as long as with another.

    Args:
        run: a run of a `benchmark_config`. Every rank must call this with the same arguments.
        rounds: measurements of each length.
        block: steps that are timed together.
        lengths: micro-batches of a rank in a step; each is a divisor of `MANY`.

    Returns:
        For each length, the seconds per step, [rounds].
    """
    from distvgg.data.dataset import train_and_val
    from distvgg.data.loader import DeviceImages
    from distvgg.training.state import of_global_batch
    from distvgg.training.step import train_step

    config, device = run.config, run.accelerator.device
    rows, _, _ = train_and_val(run.dataset, config.data)
    pixels = DeviceImages(run.dataset, run.dataset.train, config.model.image_size, device)
    each = run.plan.world_size * run.plan.micro_batch_size
    run.gradients.detach()
    runs = {length: of_global_batch(run, length * each, pixels, rows) for length in lengths}
    times: Times = {accumulation: [] for accumulation in lengths}
    for nth in range(rounds):
        for accumulation in lengths if nth % 2 else reversed(lengths):
            timed = runs[accumulation]
            timed.gradients.attach()
            synchronize(device)
            started = time.perf_counter()
            for _ in range(block):
                train_step(
                    timed, run.state.step, timed.loader.micro_batches(run.state.step), lr=0.0
                )
                run.state.step += 1
                run.monitor.poll()
            synchronize(device)
            times[accumulation].append((time.perf_counter() - started) / block)
            timed.gradients.detach()
    run.gradients.attach()
    return times


def synchronize(device: torch.device) -> None:
    """Waits for a device, so that the time of a block contains only the work of that block."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def shared_seconds(run: "Run", rounds: int = 5) -> float:
    """Measures all the work of a step that ranks would partition; returns the median seconds."""
    from distvgg.optim.muon import Muon

    optimizer = getattr(run.optimizer, "optimizer", None)  # run.optimizer is accelerate's wrapper
    if not isinstance(optimizer, Muon):
        return 0.0
    device, seconds = run.accelerator.device, []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        optimizer.rehearse()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def fit_gpu(times: Times, block: int = 1, shared: float = 0.0) -> Gpu:
    """Computes the times of one GPU from measured steps, by medians.

    The jitter comes from the spread of the middle half. A burst of other work on the machine
    therefore does not count as jitter of the GPU.

    Args:
        times: seconds per step, as from `step_times`.
        block: steps that were timed together.
        shared: seconds of each step for the work that ranks partition.
    """
    few, many = statistics.median(times[FEW]), statistics.median(times[MANY])
    own = few - FEW * (many - few) / (MANY - FEW)
    fixed, shared = max(0.0, own - shared), min(shared, max(0.0, own))
    low, _, high = statistics.quantiles(times[MANY], n=4)
    # The quartiles of a normal distribution are 1.349 standard deviations apart. A block averages
    # its steps.
    jitter = (high - low) / 1.349 * block**0.5 / many
    return Gpu((many - fixed - shared) / MANY, fixed, jitter, shared)


def origins(setup: Setup, options: BenchOptions, source: str, alone: int) -> list[str]:
    """Returns lines that state the source of each number."""
    gpu, fabric = setup.gpu, setup.fabric
    rate = step(setup, 1, alone).rate
    named = HARDWARE[options.gpu or "h100"]
    takes = (
        f"{rate:,.0f} images/s: {1000 * gpu.micro_batch:.3g} ms a micro-batch,"
        f" {1000 * gpu.fixed:.3g} ms a step by itself, jitter {gpu.jitter:.1%}"
    )
    if gpu.shared:
        takes += f", {1000 * gpu.shared:.3g} ms of Muon, partitioned over GPUs"
    words = {
        "measured": f"measured on {hardware(_device())}",
        "given": "given by images_per_sec, nothing measured",
        "assumed": "ASSUMED",
    }
    lines = [f"one GPU   {takes} ({words[source]})"]
    if source == "assumed":
        lines.append(f"          {assumption(options, setup.job)}")
    if not gpu.jitter:
        lines.append("          jitter unknown: stragglers are not modelled; --jitter 0.02")
    given = options.nvlink is not None and options.network is not None
    lines.append(
        f"links     {fabric.gpus_per_node} GPUs a node; {fabric.inside.bandwidth / 1e9:.3g} GB/s"
        f" within, {fabric.between.bandwidth / 1e9:.3g} GB/s a GPU between nodes"
        f" ({'given' if given else f'ASSUMED, {named.name}'})"
    )
    return lines


def _device() -> torch.device:
    from distvgg.distributed.device import device_here

    return device_here()


def cells(setup: Setup, taken: Step, alone: int) -> list[str]:
    """Returns the cells of one row of a table."""
    micro_batches = taken.global_batch_size // (taken.ranks * setup.job.micro_batch_size)
    return [
        *(f"{n:,}" for n in (taken.ranks, micro_batches, taken.global_batch_size)),
        *(f"{1000 * s:.3f}" for s in (taken.seconds, taken.exposed, taken.wait)),
        f"{taken.rate:,.0f}",
        f"{efficiency(setup, taken, alone):.1%}",
    ]


def batch_words(setup: Setup, ranks: int, alone: int) -> str:
    """Returns the smallest global batch with the target efficiency, as text."""
    found = smallest_batch(setup, ranks, alone)
    return "none" if found is None else f"{found:,}"


def expectations(setup: Setup, options: BenchOptions, batch: int, alone: int) -> list[str]:
    """Returns the number of GPUs that the recipe feeds, and a prediction for each of `ASKED`."""
    m = setup.job.micro_batch_size
    lines = [
        f"The recipe's global batch of {batch:,} feeds at most {counted(alone, 'GPU')}, a"
        f" micro-batch of {m} each. A larger one feeds more: another run, whose learning rate is to"
        " be found again."
    ]
    for ranks in (n for n in ASKED if n <= options.max_gpus):
        found = smallest_batch(setup, ranks, alone)
        if found is None:
            lines.append(
                f"{ranks} GPUs: never at {TARGET:.0%}, the slowest of them takes too long."
            )
            continue
        taken = step(setup, ranks, found // (ranks * m))
        lines.append(
            f"{ranks} GPUs: {taken.rate:,.0f} images/s at a global batch of {found:,}, as"
            f" {ranks * efficiency(setup, taken, alone):.1f} single GPUs."
        )
    return lines


def findings(
    config: Config,
    recipe: str,
    options: BenchOptions,
    source: str,
    setup: Setup,
    strong: Sequence[Step],
    weak: Sequence[Step],
) -> dict[str, Any]:
    """Returns all results as plain values: curves as lists of points; seconds, bytes, images."""
    batch = config.train
    alone = batch.global_batch_size // batch.micro_batch_size

    def points(steps: Sequence[Step]) -> list[dict[str, Any]]:
        return [
            {
                "gpus": s.ranks,
                "global_batch_size": s.global_batch_size,
                "step_seconds": s.seconds,
                "compute_seconds": s.compute,
                "exposed_seconds": s.exposed,
                "wait_seconds": s.wait,
                "images_per_sec": s.rate,
                "efficiency": efficiency(setup, s, alone),
                "smallest_efficient_batch": smallest_batch(setup, s.ranks, alone),
            }
            for s in steps
        ]

    return {
        "recipe": recipe,
        "micro_batch_size": batch.micro_batch_size,
        "global_batch_size": batch.global_batch_size,
        "gradient_bytes": sum(sum(layer.gradients) for layer in setup.job.layers),
        "flops_per_image": setup.job.flops,
        "one_gpu": {"source": source, **setup.gpu._asdict()},
        "options": options.model_dump(),
        "fabric": setup.fabric._asdict()
        | {"inside": setup.fabric.inside._asdict(), "between": setup.fabric.between._asdict()},
        "strong": points(strong),
        "weak": points(weak),
        "hardware": hardware(_device()) if source == "measured" else None,
        "versions": versions(),
        "commit": commit(),
    }
