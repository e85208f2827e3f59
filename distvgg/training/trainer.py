"""The training loop: steps, rows, validations, checkpoints, and the end of a run.

Invariant: neither rows nor validations nor checkpoints change what follows. Progress is one
integer, the step.
"""

import math
from pathlib import Path

from distvgg import metrics, preemption
from distvgg.config import Config, SplitName
from distvgg.data.micro_batches import EvalSource
from distvgg.data.plan import BatchPlan
from distvgg.distributed.collectives import StopConsensus
from distvgg.distributed.peer_failure import clean_shutdown, translate_peer_failure
from distvgg.errors import RunError, UserError
from distvgg.optim.schedule import lr_at
from distvgg.preemption import Preempted
from distvgg.runs.confusion import Confusion, save_confusion
from distvgg.runs.folder import check_same_config, mark_stopped
from distvgg.runs.layout import STOP_FILE
from distvgg.runs.result import Result, read_result, save_result, save_weights
from distvgg.tracking.console import Best
from distvgg.tracking.trackers import Tracking
from distvgg.training.banner import startup_banner
from distvgg.training.diagnose import diagnose
from distvgg.training.evaluation import Evaluation, evaluate_over_ranks
from distvgg.training.nan_monitor import NonFiniteError
from distvgg.training.overfit import overfit_verdict
from distvgg.training.profiling import StepProfiler
from distvgg.training.setup import build
from distvgg.training.state import Run, checkpoint_tensors, synchronized_eval_model, warmup_steps
from distvgg.training.step import train_step


def train(config: Config, run_dir: str | Path) -> Result:
    """Trains a config in a run folder, from the folder's newest valid checkpoint on.

    A finished run is only read. The program keeps its signal handlers. Trainings may follow each
    other in one process, and several processes of a launcher may call this function together.

    Args:
        config: as `distvgg.load_config` returns it.
        run_dir: the run folder; made if it does not exist.

    Raises:
        UserError: config, data, processes or run folder do not fit together.
        RunError: the loss or a gradient is not finite, another process died, or the result cannot
            be written.
        Preempted: a stop was requested; a checkpoint is saved.
    """
    if not isinstance(config, Config):
        raise UserError(f"config is {config!r}: give distvgg.load_config({str(config)!r})")
    run_dir = Path(run_dir)
    config = check_same_config(run_dir, config)
    if (earlier := read_result(run_dir)) is not None:
        return earlier
    preemption.watch_stop_file(run_dir / STOP_FILE)
    with clean_shutdown(), translate_peer_failure():
        run = build(config, run_dir)
        try:
            state = run.state
            best = None if state.best_step is None else Best(state.best_step, state.best_top1)
            tracking = Tracking(
                run.accelerator, run.config, run_dir, run.steps, state.step, state.metrics, best
            )
            banner = startup_banner(run, tracking.planned_curves())
            for line in (banner, *(f"note: {note}" for note in run.notes)):
                tracking.say(line)
            try:
                return fit(run, tracking)
            except Preempted:
                raise Preempted(stop_early(run, tracking)) from None
            except NonFiniteError as failure:
                raise RunError(diagnose(run, failure)) from None
        finally:
            run.loaders.close()
            if run.checkpoints is not None and run.lock is not None:
                run.checkpoints.wait()  # finish writing before releasing the lock
                run.lock.release()


def fit(run: Run, tracking: Tracking) -> Result:
    """Takes the remaining steps, with rows, validations and checkpoints when they are due."""
    config, state = run.config, run.state
    warmup = warmup_steps(run)
    profiler = StepProfiler(run, tracking.say)
    while True:
        # Before the step, so that a resumed run first does what was due when it stopped.
        if validation_due(run):
            validate(run, tracking)
        if checkpoint_due(run):
            save_checkpoint(run, tracking)
        if state.step == run.steps:
            return finish(run, tracking)
        if run.monitor.stop:
            run.monitor.drain()
            raise Preempted

        with run.clock.waiting_for_data():
            micro_batches = run.loader.micro_batches(state.step)
        lr = lr_at(state.step, config.optim, run.steps, warmup)
        train_step(run, state.step, micro_batches, lr)
        state.step += 1
        run.clock.step_done()
        tracking.step_done()
        profiler.step_done()
        run.monitor.poll()
        if due(state.step, config.track.every_steps, run.steps):
            run.monitor.drain()
            tracking.log(train_row(run, lr))
        for part in (run.checkpoints, run.graphs):
            if part and (failure := part.failure()):
                tracking.say(failure)


def train_row(run: Run, lr: float) -> metrics.Row:
    """Returns the row of training metrics since the previous one."""
    row = step_fields(run) | run.meter.read()
    row |= {metrics.TRAIN_LR: lr, metrics.TRAIN_GRAD_NORM: run.monitor.grad_norm}
    if run.accelerator.scaler is not None:
        row[metrics.TRAIN_SKIPPED] = run.monitor.skipped
    return row | run.clock.read()


def validate(run: Run, tracking: Tracking) -> None:
    """Measures the validation split, and records it if it is the best so far."""
    run.monitor.drain()  # steps that the device still computes count as training time
    with run.clock.paused():
        val = measure(run, run.val_loader).row
        tracking.log(step_fields(run) | add_prefix("val", val))
    state = run.state
    state.validated, state.val = state.step, val
    if state.best_step is None or val[metrics.TOP1] > state.best_top1:
        state.best_step, state.best_top1 = state.step, val[metrics.TOP1]


def measure(run: Run, loader: EvalSource) -> Evaluation:
    """Evaluates the network over all ranks.

    Raises:
        Preempted: a stop was requested on some rank; every rank raises it.
    """
    run.monitor.drain()
    consensus = StopConsensus(run.accelerator)

    def leave_if_requested() -> None:
        if consensus.asked(preemption.requested()):
            raise Preempted

    found = evaluate_over_ranks(
        run.accelerator,
        synchronized_eval_model(run),
        loader,
        run.dataset,
        flip=run.config.eval.tta == "flip",
        between=leave_if_requested,
    )
    consensus.close()
    return found


def save_checkpoint(run: Run, tracking: Tracking) -> None:
    """Starts to save the run after its last step, on the main process, in the background.

    A collective operation, unless the network of this step is measured already, as `stop_early` has
    it: then the main process alone may call it.
    """
    run.monitor.drain()  # on all ranks, so that none saves a step that is not finite
    state, scaler = run.state, run.accelerator.scaler
    state.saved, state.timed = state.step, run.clock.totals()
    state.skipped, state.skipped_in_a_row = run.monitor.skipped, run.monitor.skipped_in_a_row
    state.scaler = scaler and scaler.state_dict()
    with run.clock.paused():
        kept = synchronized_eval_model(run)
        if run.checkpoints is None:
            return
        state.metrics = tracking.mark()
        model, rest = checkpoint_tensors(run, kept)
        run.checkpoints.save(
            state.step,
            model,
            rest,
            state.model_dump(),
            best=state.best_step,
            flush=tracking.flush,
        )


def stop_early(run: Run, tracking: Tracking) -> str:
    """Saves a checkpoint and the marker REQUEUE.

    Returns:
        A line for the user.

    Raises:
        RunError: the checkpoint could not be written; there is no marker then.
    """
    synchronized_eval_model(run)  # collective; no rank waits for another after this
    preemption.ignore()
    state, checkpoints = run.state, run.checkpoints
    at = f"{preemption.stop_reason()}: stopped after step {state.step} of {run.steps}"
    if checkpoints is not None:
        checkpoints.wait()
        if checkpoints.saved < state.step:
            save_checkpoint(run, tracking)
            checkpoints.wait()
        failures = list(iter(checkpoints.failure, None))
        if checkpoints.saved < state.step:
            raise RunError(f"{at}; {failures[-1]}")
        for failure in failures:
            tracking.say(failure)
        mark_stopped(run.folder, requeue=True)
    run.accelerator.end_training()
    return f"{at}, with a checkpoint: the same command resumes from it"


def finish(run: Run, tracking: Tracking) -> Result:
    """Measures test once, if the config says so, and writes weights, confusion matrix and result.

    Raises:
        RunError: they cannot be written.
        Preempted: a stop was requested.
    """
    state, test = run.state, None
    if run.config.eval.test and run.dataset.test is not None:
        final = measure(run, run.loaders.evaluation(run.dataset.test, None))
        test = final.row
        tracking.log(step_fields(run) | add_prefix("test", test))
    else:  # again, because the confusion matrix is not in a checkpoint
        final = measure(run, run.val_loader)
    kept = synchronized_eval_model(run)
    split: SplitName = "val" if test is None else "test"
    confusion = Confusion.of(run.dataset, split, final.confusion, final.reliability)
    preemption.ignore()  # no rank waits for another after this
    result = Result.of(
        run.config,
        run.dataset,
        run.plan,
        run.accelerator,
        val=state.val,
        best={metrics.STEP: state.best_step or 0, metrics.TOP1: state.best_top1},
        test=test,
        starts=state.starts,
        images_per_sec=run.clock.images_per_sec(),
        curves=tracking.curves(),
        initial_weights=run.initial_weights,
    )
    if run.checkpoints is not None:
        run.checkpoints.wait()
        for failure in iter(run.checkpoints.failure, None):
            tracking.say(failure)
        try:
            tracking.flush()
            if run.config.train.overfit_batches:
                tracking.say(overfit_verdict(run))
            weights, _ = checkpoint_tensors(run, kept)
            save_weights(weights, run.preprocessing.metadata(), run.folder)
            mark_stopped(run.folder, requeue=False)
            save_confusion(confusion, run.folder)
            save_result(result, run.folder)
        except OSError as error:
            raise RunError(
                f"the result cannot be written to {run.folder} ({error.strerror}): make room, and"
                " the same command resumes from the last checkpoint"
            ) from error
    run.accelerator.end_training()
    return result


def step_fields(run: Run) -> metrics.Row:
    """Returns the fields that every row begins with."""
    return {metrics.STEP: run.state.step, metrics.EPOCH: run.plan.epoch(run.state.step)}


def checkpoint_due(run: Run) -> bool:
    """Returns True at the interval, at the end, and where validation was the best so far."""
    state, every = run.state, run.config.checkpoint.every_steps
    best = state.best_step == state.step
    return state.step > state.saved and (best or due(state.step, every or run.steps, run.steps))


def validation_due(run: Run) -> bool:
    """Returns True where a validation is due, also one that an earlier launch did not finish."""
    state, every = run.state, run.config.eval.every_epochs
    return state.step > state.validated and evaluation_due(state.step, every, run.plan, run.steps)


def due(step: int, every: int, total: int) -> bool:
    """Returns True after every `every` steps, and at the end."""
    return step % every == 0 or step == total


def evaluation_due(step: int, every_epochs: float, plan: BatchPlan, total: int) -> bool:
    """Returns True where step `step` passed a multiple of `every_epochs`, and at the end."""

    def passed(steps: int) -> int:
        # The rounding error of a fraction such as 0.1 must not cost a step: as in BatchPlan.steps.
        return math.floor(plan.epoch(steps + 1e-6) / every_epochs)

    return passed(step) > passed(step - 1) or step == total


def add_prefix(split: str, row: metrics.Row) -> metrics.Row:
    """Returns a split's metrics under the names that they have in rows."""
    return {f"{split}/{name}": value for name, value in row.items()}
