"""The job scripts, unmodified, on a real SLURM cluster of two nodes with two declared GPUs each.

./launch/test.sh -m slurm -n 0      (root, and Debian's slurm-wlm, munge and iproute2)
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import CONTROLLER, Cluster, default_proctrack, missing
from distvgg.recipe import load
from processes import ROOT, TINY, assert_same_run, descendants, rows
from wandb_server import KEY, WandbServer

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"a SLURM cluster needs {missing()}"),
]

JOB, ARRAY = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "slurm_array.sbatch"
WORDS = (
    *("quickstart", *TINY),
    *("--train.epochs", "15", "--eval.every_epochs", "4", "--checkpoint.every_steps", "10"),
)
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


# SIGTERM comes to a step's task alone, as on real clusters, only there.
TERM = pytest.mark.skipif(
    default_proctrack() != "cgroup", reason="SIGTERM needs proctrack/cgroup, and that a v1 freezer"
)


class Login:
    """A user's shell on the login node: a folder to submit from, an environment that jobs get."""

    def __init__(self, cluster: Cluster, folder: Path, env: Mapping[str, str]) -> None:
        self.cluster, self.folder, self.env = cluster, folder, dict(env)

    def submit(
        self,
        *options: str,
        words: tuple[str, ...] = WORDS,
        script: Path = JOB,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """sbatch; returns the job's id."""
        command = ("sbatch", "--parsable", *options, str(script), *words)
        return self.cluster.run(*command, env=self.env | dict(env or {}), cwd=self.folder)

    def run_dir(self, job: str) -> Path:
        return self.folder / "runs" / f"distvgg-{job}"

    def log(self, job: str) -> str:
        """All that the job's log has, with what is known of the job: for a test that failed too."""
        path = self.folder / f"distvgg-{job}.log"
        return path.read_text() if path.exists() else f"no log yet\n{self.cluster.describe()}"

    def until_step(self, job: str, step: int) -> None:
        """Waits for a row of this step or a later one."""
        end = time.monotonic() + 60
        while not any(row["step"] >= step for row in rows(self.run_dir(job))[-1:]):
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.05)

    def until_state(self, job: str, *states: str, within: float = 100) -> dict[str, str]:
        """Waits for one of some states; returns what SLURM knows of the job then."""
        end = time.monotonic() + within
        while (known := self.cluster.job(job))["JobState"] not in states:
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.3)
        return known

    def must_complete(self, job: str) -> dict[str, str]:
        known = self.until_state(job, *FINAL)
        assert known["JobState"] == "COMPLETED", self.log(job)
        return known


@pytest.fixture(scope="module")
def login(newcomer: None, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Login]:
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PATH": path}
    if shutil.which("nvidia-smi"):  # the cluster's GPUs are declared, whatever this machine has
        env["ACCELERATE_USE_CPU"] = "true"
    settings = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
    partitions = {"main": "PriorityTier=1", "urgent": "PriorityTier=2 PreemptMode=OFF"}
    with Cluster(gpus=4, settings=settings, partitions=partitions) as cluster:
        yield Login(cluster, tmp_path_factory.mktemp("login"), env)


@pytest.fixture(scope="module")
def wandb(login: Login) -> Iterator[WandbServer]:
    """A W&B server that the nodes reach, and know the key of."""

    def serve() -> WandbServer:
        login.cluster.enter_network(CONTROLLER)
        return WandbServer(host=login.cluster.addresses[CONTROLLER])

    with ThreadPoolExecutor(1) as pool, pool.submit(serve).result() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def online(wandb: WandbServer) -> dict[str, str]:
    return {"WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": KEY}


@pytest.fixture(scope="module")
def data() -> tuple[str, ...]:
    """The real images where they are there, else the synthetic ones."""
    path = os.environ.get("DISTVGG_CIFAR100")
    return ("--data.name", "cifar100", "--data.path", path) if path else ()


TWO = ("--nodes=2", "--gpus-per-node=2")
WANDB = ("--track.wandb", "true")
GPU = "--gpus-per-node=1"


@pytest.fixture(scope="module")
def undisturbed(login: Login, online: dict[str, str], data: tuple[str, ...]) -> str:
    """A job over two nodes that nothing happened to."""
    job = login.submit(*TWO, words=(*WORDS, *data, *WANDB), env=online)
    login.must_complete(job)
    return job


def test_two_nodes_with_two_processes_each_train_one_run(
    login: Login, undisturbed: str, wandb: WandbServer
) -> None:
    run_dir, log = login.run_dir(undisturbed), login.log(undisturbed)
    assert "= 4 processes x 1 x 16" in log
    assert log.count("4 processes x") == 1  # one process speaks for all
    logs = {path.name for path in (run_dir / "logs").glob("*.log")}
    assert logs == {f"{node}.log" for node in login.cluster.nodes}
    assert [p.name for p in run_dir.parent.iterdir()] == [run_dir.name]
    # One W&B run with every row, and each validation image counted once.
    assert len(wandb.runs) == 1
    (run,) = wandb.runs.values()
    assert [row["step"] for row in run.rows()] == [row["step"] for row in rows(run_dir)]
    assert {row["val/count"] for row in rows(run_dir) if "val/count" in row} <= {103}
    assert re.search(r"val .* of 103 images", log)
    assert not (run_dir / "REQUEUE").exists()


@TERM
def test_a_preempted_job_starts_again_and_ends_with_the_same_numbers(
    login: Login,
    undisturbed: str,
    wandb: WandbServer,
    online: dict[str, str],
    data: tuple[str, ...],
) -> None:
    before = set(wandb.runs)
    job = login.submit(*TWO, words=(*WORDS, *data, *WANDB), env=online)
    login.until_step(job, 25)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null")
    login.cluster.run("sbatch", *urgent, env=login.env, cwd=login.folder)
    known = login.must_complete(job)
    assert known["Restarts"] == "1"
    assert "TERM: asking the run to save and stop" in login.log(job)
    assert "STOP: stopped after step" in login.log(job)
    assert_same_run(login.run_dir(job), login.run_dir(undisturbed))
    (run,) = (wandb.runs[id] for id in set(wandb.runs) - before)
    assert [r["step"] for r in run.rows()] == [r["step"] for r in rows(login.run_dir(job))]


def test_a_job_near_its_time_limit_saves_and_queues_itself_again(login: Login) -> None:
    """One process on one node, as a newcomer starts it, in what stands in for a container. SLURM
    looks at limits twice a minute."""
    container = {"DISTVGG_CONTAINER": "env STANDS_IN_FOR=apptainer"}
    words = (*WORDS, "--train.epochs", "100000")
    job = login.submit("--gpus-per-node=1", words=words, env=container)
    login.until_step(job, 1)
    login.cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=2")
    login.until_state(job, "PENDING", within=60)
    assert login.cluster.job(job)["Restarts"] == "1"
    assert "USR1: asking the run to save and stop" in login.log(job)
    assert "stopped early, with a checkpoint: queued again" in login.log(job)
    login.cluster.run("scancel", job)


def test_a_job_survives_the_crash_of_either_node(
    login: Login, undisturbed: str, data: tuple[str, ...]
) -> None:
    job = login.submit(*TWO, words=(*WORDS, *data), env={"SLURM_WAIT": "5"})
    first, second = login.cluster.nodes
    login.until_step(job, 25)
    # Back before SLURM has missed it, which then waits for its tasks for ever: the job notices.
    login.cluster.crash(second)
    login.cluster.start_node(second)
    login.until_state(job, "PENDING")
    assert "a node has died: queued again" in login.log(job)
    # The node that the job's script runs on: SLURM notices, after 26 s if nobody tells it.
    login.until_step(job, 60)
    login.cluster.crash(first)
    state = ("scontrol", "update", f"nodename={first}", "reason=crashed")
    login.cluster.run(*state, "state=down")
    login.until_state(job, "PENDING", "COMPLETING")
    login.cluster.start_node(first)
    login.cluster.run(*state, "state=resume")
    assert login.must_complete(job)["Restarts"] == "2"
    assert_same_run(login.run_dir(job), login.run_dir(undisturbed))


def test_a_finished_job_is_not_queued_again_for_a_slurmd_that_was_restarted(login: Login) -> None:
    """As newer SLURM does at each `scontrol reconfigure`; running steps stay."""
    job = login.submit("--gpus-per-node=1", words=("quickstart", *TINY))
    login.until_state(job, "RUNNING")
    login.cluster.restart_daemon(login.cluster.job(job)["BatchHost"])
    assert login.must_complete(job)["Restarts"] == "0"


@TERM
def test_scancel_ends_for_good_with_a_checkpoint_that_one_node_takes_up(
    login: Login, undisturbed: str, data: tuple[str, ...]
) -> None:
    words = (*WORDS, *data)
    job = login.submit(*TWO, words=words)
    login.until_step(job, 25)
    login.cluster.run("scancel", job)
    assert login.until_state(job, *FINAL)["JobState"] == "CANCELLED"
    stopped = rows(login.run_dir(job))[-1]["step"]
    saved = [p.name for p in (login.run_dir(job) / "checkpoints").iterdir()]
    assert f"step_{stopped:08}" in saved

    again = login.submit(
        *("--nodes=1", "--gpus-per-node=2"),
        words=(*words, "--run-dir", str(login.run_dir(job))),
    )
    login.must_complete(again)
    assert login.cluster.job(job)["Restarts"] == "0"
    assert_same_run(login.run_dir(job), login.run_dir(undisturbed))


def test_one_process_on_one_node_trains_the_run_of_two_nodes(
    login: Login, undisturbed: str, data: tuple[str, ...]
) -> None:
    job = login.submit("--nodes=1", "--gpus-per-node=1", words=(*WORDS, *data))
    login.must_complete(job)
    assert "= 1 process x 4 x 16" in login.log(job)
    assert_same_run(login.run_dir(job), login.run_dir(undisturbed))


@TERM
def test_the_proof_by_jobs_finds_equal_bytes(login: Login) -> None:
    words = (sys.executable, str(ROOT / "launch" / "prove.py"), "quickstart", "--slurm")
    # Seconds are left after each cut: to notice a row, to cancel, and to see STOP take one or two.
    words += (f"--sbatch={GPU}", *TINY, "--train.epochs", "60", "--eval.every_epochs", "20")
    done = subprocess.run(
        login.cluster.on(CONTROLLER, *words, cwd=login.folder),
        env=login.cluster.environment(login.env),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.splitlines()[-1] == "equal"
    assert re.search(r"(?m)^2 -> 1 -> 2  [0-9a-f]{64} ", said)


def test_mistakes_are_one_line_within_seconds_and_not_queued_again(login: Login) -> None:
    bare = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DISTVGG_VENV": "/nowhere"}
    mistakes = {
        login.submit(words=()): "give one recipe, not none",
        login.submit(words=("quikstart",)): "did you mean quickstart?",
        login.submit(words=(*WORDS, "--optim.lr", "-1")): "optim.lr must be greater than 0",
        login.submit(words=(*WORDS, "--run-dir", "/proc/run")): "cannot write run folder /proc/run",
        login.submit(env=bare): "no environment with distvgg's packages",
        login.submit(*TWO, words=(*WORDS, "--train.global_batch_size", "32")): (
            "4 processes do not divide the 2 micro-batches"
        ),
    }
    for job, expected in mistakes.items():
        known = login.until_state(job, *FINAL)
        assert known["JobState"] == "FAILED", login.log(job)
        assert known["Restarts"] == "0"
        assert known["ExitCode"] == "2:0"
        (line,) = re.findall(r"(?m)^distvgg: error: .*", login.log(job))
        assert expected in line
        minutes, seconds = known["RunTime"].split(":")[-2:]
        assert int(minutes) * 60 + int(seconds) < 40  # all six at once, on two cores
        assert "Traceback" not in login.log(job)


def test_a_job_that_gets_no_further_stops_queueing_itself(login: Login) -> None:
    job = login.submit("--hold")
    logs = login.run_dir(job) / "logs"
    logs.mkdir(parents=True)
    (logs / "starts").write_text(f"{job} none\n" * 5)
    login.cluster.run("scontrol", "release", job)
    assert login.until_state(job, *FINAL)["JobState"] == "FAILED"
    assert "6 starts of this job found the same newest checkpoint (none)" in login.log(job)


def test_two_jobs_of_an_array_share_nodes_and_end_with_one_table(login: Login) -> None:
    # A list for a value is no sweep.
    words = ("quickstart", *TINY, "--model.max_pools", "2,3,4,5", "--sweep", "seed=3,4")
    array = login.submit(
        *("--array=0-1", "--nodes=2", "--gpus-per-node=1"), words=words, script=ARRAY
    )
    sweep = login.folder / "runs" / f"sweep-{array}"
    for task in ("0", "1"):
        login.until_state(f"{array}_{task}", "COMPLETED")
    assert "2 of 2" in (sweep / "comparison.txt").read_text()
    logs = [(login.folder / f"sweep-{array}_{task}.log").read_text() for task in (0, 1)]
    assert all("= 2 processes x 2 x 16" in log for log in logs)
    started = [re.findall(r"(?m)^distvgg: \S+ (\S+) job", log)[0] for log in logs]
    ended = [re.findall(r"(?m)^distvgg: \S+ (\S+) ended", log)[0] for log in logs]
    assert max(started) < min(ended)  # side by side
    configs = [load(str(sweep / task / "config.yaml")) for task in ("0", "1")]
    assert [config.seed for config in configs] == [3, 4]
    assert all(config.model.max_pools == (2, 3, 4, 5) for config in configs)


def test_nodes_without_slurm_start_again_after_a_worker_died(login: Login, tmp_path: Path) -> None:
    synthetic = login.submit("--nodes=1", "--gpus-per-node=1")
    head, other = login.cluster.nodes
    env = login.env | {"HEAD": head, "NODES": "2", "PROCESSES_PER_NODE": "1"}
    env |= {"DISTVGG_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    script = (str(ROOT / "launch" / "multi_node.sh"), *WORDS, "--run-dir", str(tmp_path / "run"))
    nodes = [
        subprocess.Popen(
            login.cluster.on(node, *script),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (head, other)
    ]
    while not any(row["step"] >= 25 for row in rows(tmp_path / "run")[-1:]):
        assert all(node.poll() is None for node in nodes), [
            node.communicate()[0] for node in nodes if node.poll() is not None
        ]
        time.sleep(0.05)
    descendants(nodes[1].pid, " train ")[-1].kill()
    said = [node.communicate(timeout=100)[0] for node in nodes]
    login.must_complete(synthetic)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "resumed after step" in "".join(said)
    assert_same_run(tmp_path / "run", login.run_dir(synthetic))
