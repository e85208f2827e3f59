"""A real SLURM cluster on one machine: munged, slurmctld and a slurmd for each node.

Each host (the controller, where clients run, and the nodes) has a network, mount and UTS namespace
of its own, on a bridge that no real interface joins: `localhost` of one node is not another's,
`hostname` says the node's name, and a node takes its own name for 127.0.1.1, as Debian's do. The
file system is shared. Nothing under /etc, /run or /var is written. Invariant: `stop` leaves no
process, no namespace and no cgroup behind, whatever died before.

Needs root, Debian's slurm-wlm and munge, iproute2 and util-linux.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

NETWORK = "10.77.0"
CONTROLLER = "ctl"
FREEZER = Path("/sys/fs/cgroup/freezer")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare")
_CLONE_NEWNET = 0x40000000  # linux/sched.h
CLIENT_TIMEOUT = 60  # seconds; a client that waits for a dead daemon would wait for long


def missing() -> str:
    """What this machine lacks to run a cluster, or nothing."""
    if os.geteuid() != 0:
        return "root"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return ", ".join(absent)
    namespaces = ["unshare", "--net", "--mount", "--uts", "true"]  # not in a plain container
    done = subprocess.run(namespaces, capture_output=True)
    return "namespaces" if done.returncode else ""


def default_proctrack() -> str:
    """cgroup where a v1 freezer is there. Real clusters run it: a signal reaches a step's task and
    not what that has started."""
    return "cgroup" if os.access(FREEZER, os.W_OK) else "linuxproc"


class Cluster:
    """A running cluster; a context manager.

    Args:
        gpus: that each node declares; device nodes like /dev/null, which nobody opens.
        settings: of slurm.conf, beside or instead of the ones here.
        partitions: name -> its settings, all of them on all nodes; the first is the default.
    """

    def __init__(
        self,
        nodes: int = 2,
        gpus: int = 2,
        cpus: int = 4,
        settings: Mapping[str, str] | None = None,
        partitions: Mapping[str, str] | None = None,
    ) -> None:
        # A short path, because a unix socket lives there.
        self.folder = Path(tempfile.mkdtemp(prefix="dvslurm", dir="/tmp"))
        # Two clusters' cgroups of one node name would be one.
        self.nodes = [f"dv{os.getpid()}n{i}" for i in range(1, nodes + 1)]
        self.proctrack = default_proctrack()
        self._gpus, self._cpus = gpus, cpus
        self._settings = settings or {}
        self._partitions = partitions or {"main": ""}
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []
        # .9 and .10: torchrun sorts nodes by their address as text, so rank 0 is not on the first.
        self.addresses = {CONTROLLER: f"{NETWORK}.1"} | {
            node: f"{NETWORK}.{8 + i}" for i, node in enumerate(self.nodes, start=1)
        }

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            for host in self.addresses:
                self._make_host(host)
            self._connect()
            self._munge()
            self._daemon(CONTROLLER, "slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), 30)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """What a client (sbatch, squeue, scontrol, ...) prints, which must succeed."""
        done = self.client(*words, env=env, cwd=cwd)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def client(
        self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a client on the controller's host, as a user does on a login node."""
        return subprocess.run(
            self.on(CONTROLLER, *words, cwd=cwd),
            env=self.environment(os.environ if env is None else env),
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT,
        )

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """An environment in which SLURM's clients find this cluster."""
        return dict(env) | {"SLURM_CONF": str(self._conf)}

    def on(self, host: str, *words: str, cwd: Path | None = None) -> list[str]:
        """The command that runs something on a host, outside of SLURM."""
        enter = ["nsenter", "--target", str(self._hosts[host].pid), "--net", "--mount", "--uts"]
        return [*enter, f"--wdns={cwd or Path.cwd()}", "--", *words]

    def enter_network(self, host: str) -> None:
        """Puts the calling thread on a host's network: sockets that it makes are there."""
        with open(f"/proc/{self._hosts[host].pid}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(
            re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job))
        )

    def states(self) -> dict[str, str]:
        """Each node's state, as SLURM knows it."""
        listed = self.client("sinfo", "--noheader", "--Node", "--format=%N %T").stdout
        return dict(line.split() for line in listed.splitlines())

    def crash(self, node: str) -> None:
        """SIGKILL to all that runs on a node, its slurmd first."""
        holder = self._hosts[node].pid
        for cgroup in self._cgroups(node):
            with suppress(OSError):
                (cgroup / "freezer.state").write_text("THAWED")
        while victims := [pid for pid in _processes_with(holder) if pid != holder]:
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd, as when it has booted."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def restart_daemon(self, node: str) -> None:
        """Ends a node's slurmd and starts it again; what runs there goes on."""
        pid = int((self.folder / f"slurmd.{node}.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        self.until(lambda: not _is_alive(pid), 10)
        self.start_node(node)

    def until(self, condition: Callable[[], bool], within: float) -> None:
        """Waits for something that the cluster does."""
        end = time.monotonic() + within
        while not condition():
            assert time.monotonic() < end, self.describe()
            time.sleep(0.1)

    def describe(self) -> str:
        """Nodes and jobs as they are, for a test that failed."""
        words = (["sinfo", "-N", "-l"], ["squeue", "-a", "-l"])
        return "\n".join(self.client(*w).stdout for w in words) + f"\nlogs in {self.folder}"

    def stop(self) -> None:
        """Kills all of it, and what jobs have left."""
        for host in [*self.nodes, CONTROLLER]:
            if host in self._hosts:
                self.crash(host)
                self._hosts[host].kill()
                self._hosts[host].wait()
            for cgroup in self._cgroups(host):
                with suppress(OSError):
                    cgroup.rmdir()
        for daemon in self._daemons:
            daemon.wait()
        with suppress(OSError):
            os.kill(int((self.folder / "munged.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _conf(self) -> Path:
        return self.folder / "slurm.conf"

    def _configure(self) -> None:
        d = self.folder
        settings = {
            "ClusterName": "sim",
            "SlurmctldHost": f"{CONTROLLER}({self.addresses[CONTROLLER]})",
            "CommunicationParameters": "NoCtldInAddrAny",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            # A requeued job waits until its credential has expired: 120 s by default, 5 at least.
            "AuthInfo": f"socket={d}/munge.socket,cred_expire=5",
            "StateSaveLocation": f"{d}/state",
            "SlurmdSpoolDir": f"{d}/spool.%n",
            "SlurmctldPidFile": f"{d}/slurmctld.pid",
            "SlurmdPidFile": f"{d}/slurmd.%n.pid",
            "SlurmctldLogFile": f"{d}/slurmctld.log",
            "SlurmdLogFile": f"{d}/slurmd.%n.log",
            "ProctrackType": f"proctrack/{self.proctrack}",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MailProg": "/bin/true",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0",
            "SlurmdParameters": "config_overrides",
            "JobRequeue": "0",  # a job that may be requeued has to say so
            "ReturnToService": "2",
            "SlurmdTimeout": "10",
            "MessageTimeout": "10",
            "UnkillableStepTimeout": "20",
            "KillWait": "15",
            "MinJobAge": "3600",
            "GresTypes": "gpu",
        } | dict(self._settings)
        lines = [f"{name}={value}" for name, value in settings.items()]
        for node in self.nodes:
            gres = f" Gres=gpu:{self._gpus}" if self._gpus else ""
            address = f"NodeName={node} NodeAddr={self.addresses[node]}"
            lines.append(f"{address} CPUs={self._cpus} RealMemory=64000{gres}")
        for i, (name, words) in enumerate(self._partitions.items()):
            default = "NO" if i else "YES"
            where = f"Nodes={','.join(self.nodes)} Default={default} MaxTime=INFINITE"
            lines.append(f"PartitionName={name} {where} {words}")
        self._conf.write_text("\n".join(lines) + "\n")
        if self.proctrack == "cgroup":
            (d / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gres = [f"NodeName={n} Name=gpu File={d}/gpu[0-{self._gpus - 1}]" for n in self.nodes]
        (d / "gres.conf").write_text("\n".join(gres if self._gpus else []) + "\n")
        for i in range(self._gpus):
            subprocess.run(["mknod", str(d / f"gpu{i}"), "c", "1", "3"], check=True)
        (d / "state").mkdir()
        names = Path("/etc/nsswitch.conf").read_text()
        (d / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*", "hosts: files", names))  # no DNS

    def _make_host(self, host: str) -> None:
        """A process that does nothing but hold a host's namespaces."""
        (self.folder / f"spool.{host}").mkdir()
        own = {address: name for name, address in self.addresses.items() if name != host}
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {host}", *(f"{a} {n}" for a, n in own.items())]
        if host == CONTROLLER:
            lines[1] = f"{self.addresses[host]} {host}"
        (self.folder / f"hosts.{host}").write_text("\n".join(lines) + "\n")
        script = (
            f"mount --bind {self.folder}/hosts.{host} /etc/hosts &&"
            f" mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf &&"
            f" echo {host} >/proc/sys/kernel/hostname && ip link set lo up &&"
            " echo ready && exec sleep infinity"
        )
        unshare = ["unshare", "--net", "--uts", "--mount", "--propagation", "slave"]
        holder = subprocess.Popen(
            [*unshare, "bash", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        self._hosts[host] = holder
        assert holder.stdout is not None
        with holder.stdout as said:
            assert said.readline() == b"ready\n"

    def _connect(self) -> None:
        """A bridge on the controller's host, a cable from it to each node."""

        def ip(words: str) -> None:
            subprocess.run(self.on(CONTROLLER, "ip", *words.split()), check=True)

        ip("link add br0 type bridge")
        ip(f"addr add {self.addresses[CONTROLLER]}/24 dev br0")
        ip("link set br0 up")
        for i, node in enumerate(self.nodes):
            ip(f"link add v{i} type veth peer name eth0 netns {self._hosts[node].pid}")
            ip(f"link set v{i} master br0 up")
            for words in (f"addr add {self.addresses[node]}/24 dev eth0", "link set eth0 up"):
                subprocess.run(self.on(node, "ip", *words.split()), check=True)

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = {
            "socket": "munge.socket",
            "key-file": key.name,
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
            "log-file": "munged.log",
        }
        words = [f"--{name}={self.folder / file}" for name, file in options.items()]
        # --force: the folder may be writable by others than root.
        subprocess.run(["munged", "--force", *words], check=True, capture_output=True)

    def _daemon(self, host: str, *words: str) -> None:
        with (self.folder / f"{host}.out").open("a") as output:
            daemon = subprocess.Popen(
                self.on(host, *words, cwd=Path("/")),
                env=os.environ | {"SLURM_CONF": str(self._conf)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _cgroups(self, host: str) -> list[Path]:
        """The cgroups that a node's slurmd has made, the innermost first."""
        top = FREEZER / f"slurm_{host}"
        return sorted((p for p in [top, *top.rglob("*")] if p.is_dir()), reverse=True)


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _processes_with(holder: int) -> list[int]:
    """All processes in the mount namespace of another."""
    namespace = os.readlink(f"/proc/{holder}/ns/mnt")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(folder / "ns" / "mnt") == namespace:
                found.append(int(folder.name))
    return found
