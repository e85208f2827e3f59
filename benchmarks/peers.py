"""distvgg beside the training loops that people use: images/s of the same job on the same machine.

    python -m benchmarks.peers [--data.path FOLDER] [--rounds 5] [--only NAME ...] [--out FILE]

The job: the network of the `fast` recipe on the train split of its data, random crop and flip, SGD,
256 images an optimizer step. Where a loop differs, its row says so. Each loop is a generator below
that yields after every optimizer step; it starts anew in each round, in one process of its own with
as many threads as torch takes. Its first steps fill caches and loader queues and do not count.
distvgg is started as `launch/multi_gpu.sh` starts it, without W&B, and its numbers are those of its
own metrics.jsonl: on a GPU one process, as the loops are, on a CPU two, and one for comparison.

The loops get the settings that are best for them as far as their style allows: a loader worker for
every core, and the batch in one forward. (In one process the plain step was a tenth slower in
distvgg's micro-batches: 161 to 180 images/s, medians of two rounds on two cores of an AMD EPYC.)
They do none of what distvgg does beside training: rows, gradient norms, checkpoints. bf16 is used
by all that know it, or by none, as distvgg finds the device good at it.
"""

import argparse
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from benchmarks import measure
from benchmarks.runs import PLAIN, rows
from distvgg.commands.text_tables import markdown_table
from distvgg.config import Config
from distvgg.data.cache import load_dataset
from distvgg.distributed.device import device_here, resolve_precision
from distvgg.distributed.host_memory import keep_freed_memory
from distvgg.errors import RunError
from distvgg.metrics import IMAGES_PER_SEC
from distvgg.models.vgg import VGG, build_vgg
from distvgg.recipe import load
from distvgg.runs.layout import STOP_FILE
from distvgg.wording import counted

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
REFERENCE = "distvgg"
LR = 0.01  # about distvgg's in its first steps of warm-up: no loop runs away in so few
TUTORIAL_SIDE = 227


@dataclass(frozen=True)
class Job:
    """What a loop is to do.

    `batch_size` images an optimizer step, `forward_size` of them a forward; `workers` of a loader.
    """

    config: Config
    batch_size: int
    forward_size: int
    workers: int


Steps = Iterator[int]  # the images of each optimizer step


def tutorial(job: Job) -> Steps:
    """Images blown up to 227 x 227, fp32, loaded by the process that trains."""
    device, data, side = device_here(), TrainImages(job.config), job.config.model.image_size
    data.transform = transforms.Compose(
        [
            transforms.Resize((side, side)),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    loader = DataLoader(data, job.batch_size, shuffle=True)
    model = network(data, job).to(device)
    optimizer = sgd(model, job)
    criterion = nn.CrossEntropyLoss()
    for images, labels in forever(loader):
        images, labels = images.to(device), labels.to(device)
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(labels)


def repository(job: Job) -> Steps:
    """As most CIFAR-100 repositories train: fp32, loader workers, the loss read after each step."""
    device, data = device_here(), TrainImages(job.config)
    data.transform = transforms.Compose(
        [
            *crop_and_flip(job),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    loader = DataLoader(data, job.batch_size, shuffle=True, num_workers=job.workers)
    model = network(data, job).to(device)
    optimizer = sgd(model, job)
    criterion = nn.CrossEntropyLoss()
    running = 0.0
    for images, labels in forever(loader):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        running += loss.item()
        yield len(labels)


def accelerate_example(job: Job) -> Steps:
    """Trains as accelerate's image classification examples do.

    Everything is prepared; images are normalised on the device, and the loss is kept there.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=job.config.train.precision)
    data = TrainImages(job.config)
    data.transform = transforms.Compose([*crop_and_flip(job), transforms.ToTensor()])
    loader = DataLoader(data, job.batch_size, shuffle=True, num_workers=job.workers)
    model = network(data, job).to(accelerator.device)
    mean, std = data.moments(accelerator.device)
    optimizer = sgd(model, job)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=10**6)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    total_loss: Any = 0
    for images, labels in forever(loader):
        loss = F.cross_entropy(model((images - mean) / std), labels)
        total_loss += loss.detach().float()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield len(labels)


def tuned_torch(job: Job) -> Steps:
    """Trains with torch alone, as its performance guides advise.

    It uses channels_last under autocast, bytes from persistent workers through pinned memory, and a
    fused optimizer. There is no host synchronisation.
    """
    device, data = device_here(), TrainImages(job.config)
    torch.backends.cudnn.benchmark = True
    data.transform = transforms.Compose([*crop_and_flip(job), transforms.PILToTensor()])
    loader = DataLoader(
        data,
        job.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=job.workers,
        persistent_workers=True,
        pin_memory=device.type != "cpu",
    )
    model = channels_last(network(data, job)).to(device)
    mean, std = data.moments(device)
    optimizer = sgd(model, job, fused=True)
    for images, labels in forever(loader):
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        plain_step(model, optimizer, (images.float() / 255 - mean) / std, labels, job)
        yield len(labels)


def tuned_torch_and_memory(job: Job) -> Steps:
    """`tuned_torch` with the C library told to keep freed memory, which few do and all can."""
    keep_freed_memory()
    yield from tuned_torch(job)


def timm_train(job: Job) -> Steps:
    """Trains with timm's loader, prefetcher and optimizer.

    The step is that of timm's training script with --amp and --channels-last. Crops are resized;
    colours are unchanged.
    """
    from timm.data.loader import create_loader
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
    from timm.utils.metrics import AverageMeter

    device, data, side = device_here(), TrainImages(job.config), job.config.model.image_size
    torch.backends.cudnn.benchmark = True
    loader = create_loader(
        data,  # type: ignore[arg-type]  # any dataset with a transform will do
        (3, side, side),
        job.batch_size,
        is_training=True,
        color_jitter=None,  # type: ignore[arg-type]  # None is looked for
        mean=data.mean,
        std=data.std,
        num_workers=job.workers,
        pin_memory=device.type != "cpu",
        device=device,
    )
    model = channels_last(network(data, job)).to(device)
    optim = job.config.optim
    optimizer = create_optimizer_v2(
        model, opt="sgd", lr=LR, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    criterion, losses = nn.CrossEntropyLoss(), AverageMeter()  # type: ignore[no-untyped-call]
    for images, labels in forever(loader):
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(job, device):
            loss = criterion(model(images), labels)
        loss.backward()
        losses.update(loss.item(), len(labels))  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        yield len(labels)


def fixed_batch(job: Job) -> Steps:
    """The same normalised batch again and again: forward, backward and optimizer, nothing else."""
    device, data = device_here(), TrainImages(job.config)
    torch.backends.cudnn.benchmark = True
    data.transform = transforms.Compose([*crop_and_flip(job), transforms.ToTensor()])
    images, labels = next(iter(DataLoader(data, job.batch_size, shuffle=True)))
    images = images.to(device, memory_format=torch.channels_last)
    labels = labels.to(device)
    model = channels_last(network(data, job)).to(device)
    mean, std = data.moments(device)
    images = (images - mean) / std
    optimizer = sgd(model, job, fused=True)
    while True:
        plain_step(model, optimizer, images, labels, job)
        yield len(labels)


def fixed_batch_and_memory(job: Job) -> Steps:
    """`fixed_batch` with the C library told to keep freed memory."""
    keep_freed_memory()
    yield from fixed_batch(job)


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    job: Job,
) -> None:
    """Runs forward and backward in parts of the job's size, then the optimizer.

    `images` are [n, 3, side, side] float32, normalised, NHWC in memory; `labels` are [n] int64.
    """
    parts = (torch.split(tensor, job.forward_size) for tensor in (images, labels))
    for part, target in zip(*parts, strict=True):
        with autocast(job, images.device):
            loss = F.cross_entropy(model(part), target, reduction="sum") / len(labels)
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


class TrainImages(Dataset[tuple[Any, int]]):
    """The train split from the decoded cache, in the form of torchvision's CIFAR100.

    Each PIL image passes through `transform` by itself.
    """

    def __init__(self, config: Config) -> None:
        dataset = load_dataset(config.data)
        self._images, self._labels = dataset.train.images, dataset.train.labels.tolist()
        self.num_classes, self.mean, self.std = dataset.num_classes, dataset.mean, dataset.std
        self.transform: Callable[[Image.Image], Any] = lambda image: image

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self._images[index])), self._labels[index]

    def moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in 0..1, [3, 1, 1] each, for batches of NCHW."""
        return tuple(torch.tensor(m, device=device)[:, None, None] for m in (self.mean, self.std))  # type: ignore[return-value]


def crop_and_flip(job: Job) -> list[Callable[[Image.Image], Image.Image]]:
    """The recipe's augmentation by torchvision, image by image."""
    side, padding = job.config.model.image_size, job.config.augment.crop_padding
    return [transforms.RandomCrop(side, padding), transforms.RandomHorizontalFlip()]


def network(data: TrainImages, job: Job) -> VGG:
    """The job's network in training mode, of torch's own layers."""
    model = build_vgg(job.config.model, data.num_classes, job.config.seed)
    for i, layer in enumerate(model.features):
        if isinstance(layer, nn.Conv2d):
            model.features[i] = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
            model.features[i].load_state_dict(layer.state_dict())
    return model


def channels_last(model: VGG) -> VGG:
    """The same model with its filters NHWC in memory."""
    return model.to(memory_format=torch.channels_last)


def sgd(model: nn.Module, job: Job, *, fused: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    optim = job.config.optim
    return torch.optim.SGD(
        model.parameters(),
        lr=LR,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=fused,
    )


def autocast(job: Job, device: torch.device) -> torch.autocast:
    """The job's arithmetic."""
    return torch.autocast(device.type, torch.bfloat16, job.config.train.precision == "bf16")


def forever(loader: Iterable[T]) -> Iterator[T]:
    """Epoch after epoch."""
    while True:
        yield from loader


def timed(loop: Callable[[Job], Steps], job: Job, warmup: int, steps: int) -> float:
    """Images/s of a loop, here, over `steps` optimizer steps after `warmup` that do not count."""
    multiprocessing.set_start_method(None, force=True)  # loader workers as they start elsewhere
    device, taken = device_here(), loop(job)
    for _ in range(warmup):
        next(taken)
    synchronize(device)
    started = time.perf_counter()
    images = sum(next(taken) for _ in range(steps))
    synchronize(device)
    seconds = time.perf_counter() - started
    taken.close()  # type: ignore[attr-defined]  # a generator, which holds loader workers
    return images / seconds


def synchronize(device: torch.device) -> None:
    """Waits for what the device was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def in_own_process(loop: Callable[[Job], Steps], job: Job, warmup: int, steps: int) -> float:
    """`timed` in a new process, which is born with the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "timm", "accelerate"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(timed, loop, job, warmup, steps).result()


def distvgg(config: Config, processes: int, steps: int) -> float:
    """Measures images/s of a training by the project's launcher, from its second row.

    A row covers `steps` optimizer steps; the first one is the warm-up. After the second row, the
    run gets a stop request.

    Raises:
        RunError: the training ended too early, or failed.
    """
    config = config.replace(
        track__wandb=False,
        track__every_steps=steps,
        train__cpu_threads=max(1, torch.get_num_threads() // processes),
    )
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        recipe, run, log = (Path(temporary) / name for name in ("fast.yaml", "run", "log"))
        recipe.write_text(config.to_yaml())
        words = ["-m", "distvgg", "launch", "--processes", str(processes), "--", str(recipe)]
        with (
            log.open("w") as output,
            subprocess.Popen(
                [sys.executable, *words, "--run-dir", str(run)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as training,
        ):
            while training.poll() is None and len(throughputs(run)) < 2:
                time.sleep(0.2)
            if training.returncode is None:
                (run / STOP_FILE).touch()
        if training.returncode or len(throughputs(run)) < 2:
            raise RunError(f"distvgg ended with {training.returncode}:\n{log.read_text()}")
        return throughputs(run)[1]


def throughputs(run: Path) -> list[float]:
    """Images/s of a run's training rows so far."""
    return [row[IMAGES_PER_SEC] for row in rows(run) if IMAGES_PER_SEC in row]


@dataclass(frozen=True)
class Case:
    """A row of the table: `batch` in words, and how its images/s are found."""

    label: str
    batch: str
    images_per_sec: Callable[[], float]


def cases(job: Job, device: torch.device, warmup: int, steps: int) -> dict[str, Case]:
    """All rows by the names that --only takes."""
    on_cpu = device.type == "cpu"
    mixed = "bf16" if job.config.train.precision == "bf16" else "fp32"
    whole = replace(job, forward_size=job.batch_size)
    # 49 times the arithmetic of 32x32: its own batch of 64 takes two CPU cores most of a minute.
    batch = 16 if on_cpu else 64
    large = Job(job.config.replace(model__image_size=TUTORIAL_SIDE), batch, batch, workers=0)

    def peer(label: str, loop: Callable[[Job], Steps], job: Job, share: int = 1) -> Case:
        counts = [max(1, n // share) for n in (warmup, steps)]
        return Case(label, batch_in_words(job), partial(in_own_process, loop, job, *counts))

    def ours(processes: int) -> Case:
        label = f"distvgg, {counted(processes, 'process')}"
        return Case(label, batch_in_words(job), partial(distvgg, job.config, processes, steps))

    no_loader = f"one fixed batch, no loader: {mixed}, channels_last"
    cores = len(os.sched_getaffinity(0))
    found = {
        "tutorial": peer("tutorial: 227x227, fp32, no loader workers", tutorial, large, share=4),
        "repository": peer("CIFAR-100 repository: fp32, loader workers", repository, whole),
        "accelerate": peer(f"accelerate's image example: {mixed}", accelerate_example, whole),
        "torch": peer(f"torch, tuned: {mixed}, channels_last", tuned_torch, whole),
        "torch-memory": peer("the same, freed memory kept", tuned_torch_and_memory, whole),
        "timm": peer(f"timm's loader and step: {mixed}, channels_last", timm_train, whole),
        "fixed": peer(no_loader, fixed_batch, whole),
        "fixed-memory": peer("the same, freed memory kept", fixed_batch_and_memory, whole),
        "fixed-parts": peer(no_loader, fixed_batch, job),
        # As many processes as launch/multi_gpu.sh starts for one GPU, or for a CPU.
        REFERENCE: ours(min(2, cores) if on_cpu else 1),
    }
    if not on_cpu:
        del found["torch-memory"], found["fixed-memory"]
    return found | ({"distvgg-1": ours(1)} if on_cpu and cores > 1 else {})


def batch_in_words(job: Job) -> str:
    """The images of an optimizer step, and how they are divided among forwards."""
    forwards = job.batch_size // job.forward_size
    return f"{job.batch_size}" if forwards == 1 else f"{forwards} x {job.forward_size}"


def main() -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed, a round; default: 8, on a GPU 200")
    parser.add_argument("--warmup", type=int, help="steps before; default: 3, on a GPU 50")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows; ratios need distvgg")
    parser.add_argument("--data.path", dest="path")
    parser.add_argument("--quick", action="store_true", help="a narrow network, synthetic images")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    device = device_here()
    config = configured(options.path, device, quick=options.quick)
    batch = config.train.global_batch_size
    job = Job(config, batch, config.train.micro_batch_size, options.workers)
    default_warmup, default_steps = (3, 8) if device.type == "cpu" else (50, 200)
    if options.quick:
        default_warmup, default_steps, options.rounds = 1, 2, 1
    warmup, steps = options.warmup or default_warmup, options.steps or default_steps
    found = cases(job, device, warmup, steps)
    if unknown := set(options.only or ()) - set(found):
        parser.error(f"no row {', '.join(sorted(unknown))}: --only takes {', '.join(found)}")
    chosen = {name: case for name, case in found.items() if name in (options.only or found)}
    if "timm" in chosen and importlib.util.find_spec("timm") is None:
        parser.error("the row timm needs timm: pip install timm, or leave it out with --only")

    num_classes = load_dataset(config.data).num_classes  # decoded once, before any clock runs
    samples = measure.in_turns({n: c.images_per_sec for n, c in chosen.items()}, options.rounds)
    results = [row(name, case, samples) for name, case in chosen.items()]
    print(markdown_table(*in_cells(results)))
    model = build_vgg(config.model, num_classes, config.seed)
    findings = measure.report(
        device,
        timm=version("timm") if "timm" in chosen else None,
        data=config.data.name,
        parameters=sum(p.numel() for p in model.parameters()),
        precision=config.train.precision,
        workers=options.workers,
        rounds=options.rounds,
        warmup_steps=warmup,
        steps=steps,
        rows=results,
    )
    measure.save(findings, options.out)
    return 0


def configured(path: str | None, device: torch.device, *, quick: bool) -> Config:
    """Returns the `fast` recipe as its peers train it, with its precision resolved.

    With `quick`, the network is narrow and the images are synthetic.
    """
    precision = "bf16" if resolve_precision("auto", device) == "bf16" else "no"
    overrides: dict[str, Any] = PLAIN | {"train.precision": precision}
    if path is not None:
        overrides |= {"data.path": path}
    if quick:
        overrides |= {"data.name": "synthetic", "data.path": None, "model.width": 0.05}
    return load("fast", overrides)


def row(name: str, case: Case, samples: measure.Samples) -> dict[str, Any]:
    """Returns the findings of a case.

    If distvgg was measured too, they include its ratio in both directions, since a small ratio has
    few digits.
    """
    found: dict[str, Any] = {
        "name": name,
        "label": case.label,
        "batch": case.batch,
        "images_per_sec": measure.spread(samples[name]),
        "rounds": [round(value, 2) for value in samples[name]],
    }
    if REFERENCE in samples:
        found["ratio_to_distvgg"] = measure.ratio(samples, of=name, to=REFERENCE)
        found["distvgg_to_it"] = measure.ratio(samples, of=REFERENCE, to=name)
    return found


def in_cells(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    header = ["loop", "batch", "images/s", "min to max", "ratio to distvgg", "distvgg to it"]
    cells = []
    for found in results:
        speed = {name: f"{value:,.4g}" for name, value in found["images_per_sec"].items()}
        ratios = [found.get(name, "") for name in ("ratio_to_distvgg", "distvgg_to_it")]
        cells.append([found["label"], found["batch"], speed["median"]])
        cells[-1] += [f"{speed['min']} to {speed['max']}", *map(str, ratios)]
    return header, cells


if __name__ == "__main__":
    sys.exit(main())
