"""Sends metrics.jsonl to Weights & Biases, in a process that cannot delay the training.

A training starts `python -m distvgg.tracking.wandb_sync RUN_DIR` and holds its standard input open.

Invariant: item i of the W&B run's history is row i of metrics.jsonl, over any number of kills and
restarts. The server reports how many items it has, so metrics.jsonl alone says what is missing.

Offline, the W&B client writes all rows into one file, which `wandb sync` uploads and which replaces
the file of an earlier launch. There is no such file if a server may have rows already, because
`wandb sync` would append all rows to them. `distvgg sync` sends the missing rows in either case.
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from distvgg import file_lock, metrics, preemption
from distvgg.config import Config, TrackConfig
from distvgg.errors import UserError, first_line
from distvgg.reachability import behind_proxy, connects
from distvgg.recipe import load
from distvgg.runs.files import atomic_write
from distvgg.runs.layout import CONFIG_FILE, METRICS_FILE, REQUEUE_FILE, RESULT_FILE
from distvgg.tracking import wandb_end
from distvgg.wording import counted

if TYPE_CHECKING:
    from wandb import Run

RUN_FILE = "run.json"  # under wandb/
LOCK_FILE = ".lock"
# W&B's settings, unless the environment sets them. W&B's own limit for a server's answer is 90 s.
WANDB_DEFAULTS = {"WANDB_INIT_TIMEOUT": "20", "WANDB_CONSOLE": "off", "WANDB_SILENT": "true"}
POLL_SECONDS = 1.0
NOTE = "W&B: note: "
MAX_NAME = 128  # characters of a name or group that W&B accepts


class OfflineError(Exception):
    """W&B is not online; the message says why, and is empty if W&B is disabled."""


class RunFile(BaseModel):
    """The file wandb/run.json: the W&B run that a run folder continues.

    Attributes:
        id: of the W&B run.
        online: a server may have rows of the W&B run.
        project: of the W&B run; None until the run's first start. This and the next five fields
            come from the config and the environment of that start.
        end: hash of the end of the run that a server has; see `wandb_end.digest`.
    """

    id: str = Field(pattern=r"^[\w.-]{1,64}$")
    online: bool = True  # earlier versions wrote other fields
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: str | None = None
    notes: str | None = None
    end: str = ""


class Trainer:
    """The training that started this process, as seen from the other end of a pipe.

    Attributes:
        word: `finished`, the reason of a stop request, or empty if the training crashed or was
            killed. Empty until the end.
    """

    def __init__(self) -> None:
        self.word = ""
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def ended(self, within: float) -> bool:
        """Waits for the end of the training, `within` seconds at most."""
        return self._ended.wait(within)

    def _watch(self) -> None:
        self.word = os.read(0, 100).decode(errors="replace").strip()
        self._ended.set()
        # The client may block forever. SIGALRM ends this process wherever it is; 0 is no limit.
        signal.setitimer(signal.ITIMER_REAL, finish_timeout())


def finish_timeout() -> float:
    """Returns the seconds that an upload may take after the training; 0 is no limit."""
    try:
        return float(os.environ.get("WANDB_FINISH_TIMEOUT") or 20)
    except ValueError:
        return 20.0


def sync_command(run_dir: Path) -> str:
    """Returns the command that sends the rows that the server lacks."""
    return f"distvgg sync {shlex.quote(str(run_dir))}"


def sync(run_dir: Path) -> str:
    """Sends what the W&B server lacks of a run, and returns a line for the user.

    Raises:
        UserError: the folder is not a run, W&B is not online, or another process sends the rows.
    """
    if not (run_dir / CONFIG_FILE).exists():
        raise UserError(f"{run_dir}: not a run folder (no {CONFIG_FILE})")
    if not (run_dir / METRICS_FILE).exists():
        raise UserError(f"{run_dir}: no rows yet (no {METRICS_FILE})")
    with _locked(run_dir, wait=False):
        file = _run_file(run_dir)
        with _environment(file):
            try:
                run = _start_online(run_dir, file)
            except OfflineError as error:
                why = f"offline ({error})" if str(error) else "disabled by its settings"
                raise UserError(f"W&B: {why}; see wandb login and WANDB_MODE") from error
            had, url = run.starting_step, run.url
            sent = _send(run, run_dir / METRICS_FILE, lambda _: True)
            _finish(run, run_dir, file)
    return f"W&B: {url} has {counted(had + sent, 'row')}, {sent:,} of them new"


def follow(run_dir: Path, trainer: Trainer) -> None:
    """Sends the rows of a training until it ends. Prints lines for the user."""
    with _locked(run_dir, wait=True):
        run: Run | None
        file = _run_file(run_dir)
        with _environment(file):
            try:
                run = _start_online(run_dir, file)
                _say(f"W&B: {run.url}")
            except OfflineError as error:
                if not str(error):
                    return
                run = _start_offline(run_dir, file)
                _say(f"W&B: offline ({error}). To upload: {sync_command(run_dir)}")
            if run:
                _send(run, run_dir / METRICS_FILE, trainer.ended)
                _finish(run, run_dir, file, trainer.word)


def check_online() -> None:
    """Returns if W&B has a key and its server is reachable. Never prompts.

    Raises:
        OfflineError: it is not so, or W&B is set to offline or disabled.
        UserError: a setting of W&B is invalid.
    """
    for name, value in WANDB_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import wandb

    stdin = sys.stdin
    try:
        settings = wandb.setup().settings
        if settings.mode == "disabled":
            raise OfflineError
        if settings.mode in ("offline", "dryrun"):
            raise OfflineError("as set")
        # The client asks for a key if it sees a terminal.
        with open(os.devnull) as sys.stdin:
            wandb.login(verify=False)
    except ValidationError as error:
        setting, message = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise UserError(
            f"W&B's setting {setting}: {message}; fix {_variable(str(setting))}, or"
            " --track.wandb false"
        ) from error
    except wandb.Error as error:  # no key, or a malformed one
        raise OfflineError(first_line(error)) from error
    finally:
        sys.stdin = stdin
    url = urlsplit(settings.base_url)
    host, port = url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443)
    # The client detects this by itself, but only after WANDB_INIT_TIMEOUT.
    if not (behind_proxy(url) or connects(host, port)):
        raise OfflineError(f"no connection to {host}:{port}")


def _variable(setting: str) -> str:
    """Returns the environment variable of one of the client's settings."""
    renamed = {"run_tags": "WANDB_TAGS", "run_name": "WANDB_NAME", "run_notes": "WANDB_NOTES"}
    return renamed.get(setting, f"WANDB_{setting.upper()}")


def _start_online(run_dir: Path, file: RunFile) -> "Run":
    """Continues or creates the W&B run on the server.

    Raises:
        OfflineError: W&B is not online.
    """
    import wandb

    check_online()
    _write_run_file(run_dir, file)  # before a server has the id
    try:
        run = _init(run_dir, "online")
    except (wandb.Error, OSError) as error:
        wandb.teardown()  # the client's process refuses a second run with the same id
        raise OfflineError(first_line(error)) from error
    file.online, file.project, file.entity = True, run.project, run.entity
    _write_run_file(run_dir, file)
    _remove_offline_runs(run_dir, file.id)
    return run


def _start_offline(run_dir: Path, file: RunFile) -> "Run | None":
    """Starts a file for all rows; none if a server may have some of the rows already."""
    if file.online or any(run_dir.glob(f"wandb/offline-run-*-{file.id}/*.synced")):
        return None
    _write_run_file(run_dir, file)
    _remove_offline_runs(run_dir, file.id)
    return _init(run_dir, "offline")


@contextmanager
def _environment(file: RunFile) -> Iterator[None]:
    """Makes the W&B run the one of the file, and describes the W&B run if no server has it.

    By the environment and not by arguments, because in a sweep the client ignores arguments. A
    server that has the W&B run also has its name, tags and notes, maybe changed by the user.
    """
    new = not file.online
    values = {
        "WANDB_RUN_ID": file.id,
        "WANDB_PROJECT": file.project,
        "WANDB_ENTITY": file.entity,
        "WANDB_RUN_GROUP": file.group,
        "WANDB_NAME": file.name if new else None,
        "WANDB_TAGS": file.tags if new else None,
        "WANDB_NOTES": file.notes if new else None,
    }
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        if wandb := sys.modules.get("wandb"):
            wandb.teardown()  # the client has read the environment
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value


def _init(run_dir: Path, mode: Literal["online", "offline"]) -> "Run":
    import wandb

    config = _config(run_dir)
    run = wandb.init(
        dir=str(run_dir),
        resume="allow",
        mode=mode,
        config={k: "none" if v is None else v for k, v in config.flat().items()},
    )
    # The client drops rows whose W&B step decreases, as after a resume: `step` is sent as a value.
    run.define_metric("*", step_metric=metrics.STEP)
    return run


def _finish(run: "Run", run_dir: Path, file: RunFile, word: str = "") -> None:
    """Sends the end of a finished run, and ends the W&B run in the state of the run.

    Args:
        run: the W&B run.
        run_dir: the run folder.
        file: the run file, which notes that a server has the end.
        word: how the training ended; see `Trainer`.
    """
    # In a sweep, W&B's agent stops a trial by SIGTERM. A preempted trial would be queued again.
    by_agent = word == "SIGTERM" and "WANDB_SWEEP_ID" in os.environ
    if (run_dir / RESULT_FILE).exists():
        weights = _config(run_dir).track.wandb_artifact
        end = wandb_end.digest(run_dir, weights=weights)
        if end != file.end:
            wandb_end.send(run, run_dir, weights=weights)
        run.finish(0)
        if file.online:
            file.end = end
            _write_run_file(run_dir, file)
    elif (run_dir / REQUEUE_FILE).exists() and not by_agent:
        run.mark_preempting()
        run.finish(1)  # preempted for W&B, where 0 is finished
    else:
        run.finish(0 if word else 1)


def _send(run: "Run", path: Path, ended: Callable[[float], bool]) -> int:
    """Sends the rows of a file that grows until `ended(seconds)`, and returns their number.

    Raises:
        UserError: a line is not JSON, as after a power loss.
    """
    index = sent = read = 0
    over = False
    while not over:
        over = ended(POLL_SECONDS)  # before the file is read, so that its last rows are read
        with path.open("rb") as file:
            file.seek(read)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        read += len(content)
        for line in content.splitlines():
            if index >= run.starting_step:
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(
                        f"{path}, line {index + 1}: not JSON; the run's next launch replaces it"
                    ) from error
                run.log(metrics.without_clock(row))
                sent += 1
            index += 1
    return sent


def _config(run_dir: Path) -> Config:
    return load(str(run_dir / CONFIG_FILE))


def _run_file(run_dir: Path) -> RunFile:
    """Returns the W&B run of a run folder, described by config and environment if it is new.

    A project or name that the config sets wins over the environment, except that a sweep has its
    own project.

    Raises:
        UserError: WANDB_RUN_ID is no id.
    """
    file = _read_run_file(run_dir)
    if file.project is not None:
        return file
    track = _config(run_dir).track
    given = {} if file.online else os.environ  # a run of an earlier version had no choice
    in_sweep = "WANDB_SWEEP_ID" in given
    if in_sweep:  # the W&B run exists, in the sweep's project and with a name
        file.project = given.get("WANDB_PROJECT", "")
    elif track.project == TrackConfig().project:
        file.project = given.get("WANDB_PROJECT") or track.project
    else:
        file.project = track.project
    file.entity = given.get("WANDB_ENTITY")
    name = track.name or given.get("WANDB_NAME")
    if not name and not in_sweep:
        name = run_dir.name
    file.name = _shortened("WANDB_NAME" if name == given.get("WANDB_NAME") else "name", name)
    file.group = _shortened("WANDB_RUN_GROUP", given.get("WANDB_RUN_GROUP"))
    file.tags, file.notes = given.get("WANDB_TAGS"), given.get("WANDB_NOTES")
    return file


def _shortened(what: str, text: str | None) -> str | None:
    if text and len(text) > MAX_NAME:
        _say(f"{NOTE}{what} shortened from {len(text)} to {MAX_NAME} characters, W&B's limit")
    return text and text[:MAX_NAME]


def _read_run_file(run_dir: Path) -> RunFile:
    path = run_dir / "wandb" / RUN_FILE
    asked = os.environ.get("WANDB_RUN_ID")
    with suppress(FileNotFoundError):
        try:
            file = RunFile.model_validate_json(path.read_bytes())
            if asked and asked != file.id:
                _say(f"{NOTE}WANDB_RUN_ID={asked} is ignored: the run folder continues {file.id}")
            return file
        except (OSError, ValidationError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            _say(f"W&B: a new run with every row, because {path} is damaged")
    id = asked or secrets.token_hex(4)
    try:
        return RunFile(id=id, online=False)
    except ValidationError as error:
        raise UserError(
            f"WANDB_RUN_ID: {id!r} (expected at most 64 letters, digits, dots, - or _); unset it"
        ) from error


def _write_run_file(run_dir: Path, file: RunFile) -> None:
    atomic_write(run_dir / "wandb" / RUN_FILE, file.model_dump_json().encode())


def _remove_offline_runs(run_dir: Path, id: str) -> None:
    for folder in run_dir.glob(f"wandb/offline-run-*-{id}"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(run_dir: Path, *, wait: bool) -> Iterator[None]:
    """Lets one process at a time send the rows of a run; that of a killed training may be alive."""
    folder = run_dir / "wandb"
    try:
        folder.mkdir(exist_ok=True)
        lock = file_lock.hold(folder / LOCK_FILE, wait=wait)
    except file_lock.HeldError as error:
        raise UserError(f"{run_dir}: its training is sending the rows{error.remedy()}") from error
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


def _say(line: str) -> None:
    with suppress(BrokenPipeError):  # the training was killed
        print(line, flush=True)


def main(run_dir: Path) -> None:
    """Runs beside a training."""
    # The training decides when to end. A signal to all processes of a job must not end this one.
    for number in (*preemption.SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(run_dir, Trainer())
    # Whatever the client raises, the rows are in metrics.jsonl and the training goes on.
    except Exception as error:
        _say(f"W&B: failed ({first_line(error)}). To upload: {sync_command(run_dir)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
