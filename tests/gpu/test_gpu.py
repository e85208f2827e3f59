"""The benchmark for GPUs tried out on what is there; what a GPU must not do in a step, on a GPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.gpu import (
    device_events,
    fresh_run,
    in_kernels,
    longest_kernels,
    no_host_sync,
    traffic,
    training_seconds,
    warmed_up,
    windows,
)
from benchmarks.network_variants import orthogonalise_batch
from distvgg.data.dataset import train_val_indices
from distvgg.data.loader import DeviceImages, DeviceLoader
from distvgg.models.vgg import batch_norm_layers
from distvgg.optim.muon import orthogonalise
from distvgg.recipe import load
from distvgg.training.state import Run
from processes import TINY, Started, assert_same_run, rows, run, train

GPUS = torch.cuda.device_count()
# What tests/support/processes.py says to a test's processes keeps them off the GPU.
ON_GPU = {"ACCELERATE_USE_CPU": "false"}


@pytest.mark.long  # two minutes
def test_the_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--quick", "--no-compile", "--workers", "1", "--epochs", "1", "--out", str(out)]
    done = run(options, program=("-m", "benchmarks.gpu"), timeout=280)
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    for head in (
        *("bf16 matrix product", "step", "forward and backward", "Muon's iterations", "loop"),
        *("a step of the training loop", "from the start"),
    ):
        assert any(line.startswith(f"| {head}") for line in heads), done.stdout

    found = json.loads(out.read_text())
    assert {"hardware", "versions", "commit", "date", "card"} <= set(found)
    speeds = found["throughput"]["8"]
    assert {"fixed batch", "distvgg", "distvgg, 2 micro-batches"} < set(speeds)
    for speed in speeds.values():
        images_per_step = speed["images_per_sec"]["median"] * speed["step_ms"] / 1000
        assert round(images_per_step) in (8, 16)
        in_units_of_rate = speed["tflops"] / found["rate"]["best_tflops"]
        assert speed["of_rate"] == pytest.approx(in_units_of_rate, rel=0.02, abs=1e-4)
    assert speeds["fixed batch"]["of_fixed_batch"] == 1
    assert found["graphs"]["equal_after_steps"] == 20
    assert found["variants"]["8"]["as it is"]["of_fixed_batch"] == 1
    assert all(0.1 < start["median"] < 100 for start in found["first_step"].values())
    assert found["equal_bytes"]["bf16"]["verdict"] == "equal"
    # 16 images of 600 a step leave 75% out of reach in an epoch, and it says so.
    assert found["target"]["reached"] is None
    assert "val/top1 0.75: not reached in 1.01" in done.stdout


def test_a_full_measurement_without_a_gpu_is_refused() -> None:
    done = run([], program=("-m", "benchmarks.gpu"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("there is no CUDA GPU here: --quick")


def test_the_time_of_steps_from_their_rows() -> None:
    timed = [{"step": s, "perf/step_ms": ms} for s, ms in ((10, 100.0), (20, 50.0), (25, 40.0))]
    first = {"step": 1, "train/loss": 1.0}  # the first step is not timed
    table = [first, timed[0], {"step": 12, "val/top1": 0.5}, *timed[1:]]
    assert training_seconds(table, 10) == pytest.approx(1.0)
    assert training_seconds(table, 12) == pytest.approx(1.1)
    assert training_seconds(table, 25) == pytest.approx(1.7)
    assert training_seconds(table, 30) == pytest.approx(1.9)


def test_traffic_from_events_of_the_profiler() -> None:
    def event(category: str, name: str, at: int, length: int, size: int = 0) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": at, "dur": length, "args": {"bytes": size}}

    events = [
        {"ph": "M", "name": "process_name"},
        event("cuda_runtime", "cudaMemcpyAsync", 0, 100),
        event("kernel", "conv", 10, 20),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 30, 5, 4000),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 35, 5, 64),
        event("kernel", "conv", 40, 15),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 55, 5, 80),
    ]
    found = traffic(events, steps=2)
    assert found["kernels"] == 1
    assert (found["HtoD"], found["HtoD_bytes"]) == (0.5, 2000)
    assert (found["DtoH"], found["DtoH_bytes"]) == (0.5, 40)
    assert (found["DtoD"], found["DtoD_bytes"]) == (0.5, 32)
    assert found["busy"] == 1.0
    assert traffic(events[:2], 2)["busy"] is None


def test_orthogonalisations_in_a_batch_are_those_one_by_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (3, 20, 8)):
        matrices = torch.randn(shape)
        expected = torch.stack([orthogonalise(matrix, 3) for matrix in matrices])
        torch.testing.assert_close(orthogonalise_batch(matrices, 3), expected)


def test_kernels_and_launches_from_events_of_the_profiler() -> None:
    events = [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 4},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 5, "dur": 40},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 5, "dur": 40},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 9, "dur": 4},
        {"cat": "kernel", "name": "conv", "ts": 10, "dur": 3000},
        {"cat": "kernel", "name": "conv", "ts": 4000, "dur": 1000},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": 9000, "dur": 5},
    ]
    assert in_kernels(events, steps=2) == {"kernels": 1, "kernel_ms": 2, "launches": 1.5}
    longest = {"conv": [1, 2], "Memcpy DtoD (Device -> Device)": [0.5, 0.0025]}
    assert longest_kernels(events, steps=2) == longest
    assert list(longest_kernels(events, steps=2, most=1)) == ["conv"]


@pytest.mark.long
def test_the_benchmark_runs_compiled(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--quick", "--workers", "1", "--only", "throughput,first_step", "--out", str(out)]
    done = run(options, program=("-m", "benchmarks.gpu"), timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    compiled = {"fixed batch, compiled", "distvgg, compiled", "distvgg, 2 micro-batches, compiled"}
    assert compiled < set(found["throughput"]["8"])
    assert found["throughput"]["8"]["distvgg"]["of_rate"] is None  # no rate was asked for
    starts = found["first_step"]
    again, anew = "distvgg train, compiled before", "distvgg train, compiled"
    assert starts[again]["median"] < starts[anew]["median"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips where there is no GPU, and lets accelerate take it where there is."""
    if not GPUS:
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def on_gpu(folder: Path, **changes: object) -> Run:
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    config = load("quickstart", {name.removeprefix("--"): value for name, value in pairs})
    config = config.replace(data__train_size=4000, **changes)  # steps enough in an epoch
    made = fresh_run(config, folder / "run")
    assert made.accelerator.device.type == "cuda"
    return made


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("place", ["within an epoch", "across its end"])
def test_no_step_makes_the_host_wait(tmp_path: Path, precision: str, place: str) -> None:
    made = on_gpu(tmp_path, train__precision=precision, optim__clip_norm=1.0)
    step = warmed_up(made, windows(made.plan, 1, 8)[place])
    with no_host_sync():
        for _ in range(8):
            step()
    made.monitor.drain()
    with no_host_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        made.meter.read()  # what the rows do, at their cadence: the check can fail


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_step_copies_nothing_to_the_device(tmp_path: Path) -> None:
    """But an epoch's order and draws where one begins; to the host goes what the watch reads."""
    made = on_gpu(tmp_path)
    found = {}
    for place, first in windows(made.plan, 1, 8).items():
        step = warmed_up(made, first)
        found[place] = traffic(device_events(step, 8, made.accelerator.device), 8)
    within, across = found["within an epoch"], found["across its end"]
    assert within["kernels"] > 50  # the profiler saw the step
    assert within["HtoD"] == 0
    # G/m losses, the gradient's norm and the wish to stop, in float64.
    assert within["DtoH"] == 1
    assert within["DtoH_bytes"] == 8 * (made.plan.micro_batches + 2)
    # Order, top and left in int64, flip in one byte.
    assert across["HtoD"] * 8 <= 4
    assert 0 < across["HtoD_bytes"] * 8 <= 25 * made.plan.n_samples


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_computes_on_what_a_cpu_computes_on(tmp_path: Path) -> None:
    made = on_gpu(tmp_path)
    data, config = made.dataset, made.config
    train_rows, _ = train_val_indices(data.train.labels, config.data)
    pixels = DeviceImages(data, data.train, config.model.image_size, torch.device("cpu"))
    loader = DeviceLoader(config, pixels, train_rows, made.plan, rank=0)
    for ours, expected in zip(made.loader.micro_batches(3), loader.micro_batches(3), strict=True):
        assert torch.equal(ours.rows.cpu(), expected.rows)
        assert torch.equal(ours.labels.cpu(), expected.labels)
        torch.testing.assert_close(ours.images.cpu(), expected.images)
        assert ours.dropout_seed == expected.dropout_seed


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_a_run_on_a_gpu_repeats_itself(tmp_path: Path, precision: str) -> None:
    """Bit by bit, weights as well."""
    for name in ("one", "two"):
        said = train(tmp_path / name, "--train.precision", precision, env=ON_GPU)
        assert f"{precision} on cuda" in said
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_cuda_graphs_train_the_run_of_eager_micro_batches(tmp_path: Path, precision: str) -> None:
    """With dropout and mixed micro-batches, over 20 steps and a resume in the middle."""
    args = (
        *("--train.precision", precision, "--model.dropout", "0.5", "--data.train_size", "1400"),
        *("--augment.cutmix_alpha", "1", "--augment.mix_probability", "0.5"),
        *("--optim.name", "muon", "--optim.ema_decay", "0.9", "--checkpoint.every_steps", "5"),
    )
    eager, graphed = tmp_path / "eager", tmp_path / "graphed"
    train(eager, *args, "--train.cuda_graphs", "false", env=ON_GPU)
    started = Started(graphed, *args, env=ON_GPU)
    started.until_step(12)
    started.kill()
    said = train(graphed, *args, env=ON_GPU)
    assert "resumed after step" in said
    assert "no CUDA graphs" not in started.output() + said
    assert_same_run(eager, graphed)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_micro_batch_is_one_launch(tmp_path: Path) -> None:
    found = {}
    for on in (True, False):
        made = on_gpu(tmp_path / str(on), train__cuda_graphs=on)
        step = warmed_up(made, windows(made.plan, 1, 8)["within an epoch"])
        found[on] = in_kernels(device_events(step, 8, made.accelerator.device), 8)
        assert not (made.graphs and made.graphs.failure())
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found[True]["launches"] < found[False]["launches"] / 2
    # The same kernels, and the copies into and out of the graph's buffers.
    assert found[True]["kernels"] < 1.2 * found[False]["kernels"]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_of_batch_norm_compute_what_torch_does(dtype: torch.dtype) -> None:
    from norm_cases import LARGE, SHAPES, compare, keeps_nan

    for shape, pool in SHAPES + LARGE:
        compare("cuda", dtype, shape, pool=pool)
    keeps_nan("cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_training_takes_the_kernels(tmp_path: Path) -> None:
    made = on_gpu(tmp_path)
    assert all(layer.kernels for layer in batch_norm_layers(made.vgg))
    step = warmed_up(made, windows(made.plan, 1, 8)["within an epoch"])
    names = longest_kernels(device_events(step, 8, made.accelerator.device), 8, most=1000)
    assert any("_input_gradient" in name for name in names)
    assert not any("batch_norm" in name or "max_pool" in name for name in names)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_anomaly_detection_runs_without_graphs(tmp_path: Path) -> None:
    said = train(tmp_path / "run", "--train.detect_anomaly", "true", env=ON_GPU)
    assert "note: train.detect_anomaly: the step runs without CUDA graphs" in said


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("gpu")
def test_the_curve_is_that_of_a_cpu(tmp_path: Path) -> None:
    """Eager and compiled; without dropout, whose masks a GPU draws otherwise."""
    smooth = "--model.dropout", "0", "--optim.lr", "0.01"
    train(tmp_path / "cpu", *smooth)
    train(tmp_path / "gpu", *smooth, env=ON_GPU)
    compiled = *smooth, "--train.compile", "true"
    train(tmp_path / "compiled", *compiled, env=ON_GPU, timeout=800)
    cpu, gpu, fused = (losses(tmp_path / name) for name in ("cpu", "gpu", "compiled"))
    assert gpu != cpu  # it was another device
    assert gpu == pytest.approx(cpu, rel=0.01)  # convolutions may compute in TF32
    assert fused == pytest.approx(cpu, rel=0.01)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_processes_that_share_a_gpu_train_the_run_of_one(tmp_path: Path, precision: str) -> None:
    """Over gloo, through host memory."""
    shared = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cuda:0"}
    args = ("--train.precision", precision, "--optim.name", "muon", "--optim.ema_decay", "0.9")
    said = train(tmp_path / "one", *args, env=ON_GPU)
    assert f"{precision} on cuda" in said
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        said = train(folder, *args, env=shared, processes=processes)
        assert f"= {processes} processes" in said
        assert f"{precision} on cuda" in said
        assert_same_run(folder, tmp_path / "one")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_two_gpus_train_the_run_of_one(tmp_path: Path) -> None:
    if GPUS < 2:
        pytest.skip("needs two CUDA GPUs")
    train(tmp_path / "one", env=ON_GPU)
    said = train(tmp_path / "two", env=ON_GPU, processes=2)
    assert "= 2 processes" in said
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_benchmark_runs_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--quick", "--no-compile", "--workers", "1", "--out", str(out)]
    only = "--only", "rate,graphs,variants,throughput,traffic"
    done = run([*options, *only], program=("-m", "benchmarks.gpu"), env=ON_GPU)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["card"]["name"] == torch.cuda.get_device_name()
    assert "fixed batch, CUDA graph" in found["throughput"]["8"]
    assert found["graphs"]["equal_after_steps"] == 20
    assert found["graphs"]["with graphs"]["failure"] is None
    assert {place["sync"] for place in found["traffic"].values()} == {"no"}


def losses(run_dir: Path) -> list[float]:
    """The training losses of a run, row by row."""
    return [row["train/loss"] for row in rows(run_dir) if "train/loss" in row]
