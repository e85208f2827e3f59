"""A profile of some steady steps, on the main process.

Invariant: a profile changes no result. Without profiled steps, nothing of the profiler is imported.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from distvgg.runs.layout import PROFILE_FILE
from distvgg.training.state import Run

if TYPE_CHECKING:
    from torch.profiler import profile as Profile

SKIPPED = 11  # steps: allocation, compilation, the profiler's own start
SHOWN = 10  # operators


class StepProfiler:
    """Profiles `train.profile_steps` steps of a run, and says which operators cost most.

    Args:
        run: at its start.
        say: prints a line.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._steps = run.config.train.profile_steps if run.accelerator.is_main_process else 0
        self._profile: Profile | None = None
        if not self._steps:
            return
        left = run.steps - run.state.step
        if left < SKIPPED + self._steps:
            say(
                f"profile: {left} steps are left, too few for {SKIPPED} of warm-up and"
                f" {self._steps} of train.profile_steps: raise train.epochs"
            )
            return
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if run.accelerator.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=self._steps, repeat=1),
            on_trace_ready=self._report,
        )
        self._profile.start()

    def step_done(self) -> None:
        """Counts a step; after the last profiled one, writes the trace and says what costs most."""
        if self._profile is not None:
            self._profile.step()

    def _report(self, found: "Profile") -> None:
        self._profile = None
        path = self._run.folder / PROFILE_FILE
        device = "device" if self._run.accelerator.device.type == "cuda" else "cpu"
        name = f"self_{device}_time_total"  # microseconds
        operators = [e for e in found.key_averages() if not e.key.startswith("ProfilerStep")]
        events = sorted(operators, key=lambda e: getattr(e, name), reverse=True)
        total = sum(getattr(e, name) for e in events) or 1
        lines = [f"profile of {self._steps} steps, ms a step on the {device}: {path}"]
        for event in events[:SHOWN]:
            ms = getattr(event, name) / self._steps / 1000
            share = getattr(event, name) / total
            calls = event.count / self._steps
            lines.append(f"  {ms:9.3f}  {share:6.1%}  {calls:7.1f} calls  {event.key[:70]}")
        try:
            found.export_chrome_trace(str(path))
        except OSError as error:
            lines[0] = f"profile: {path} cannot be written ({error.strerror})"
        self._say("\n".join(lines))
