"""What every test may use: devices, data, and no network.

`run_with_devices(n, code)` runs code in a child process that sees n CPU devices; the
count cannot change once jax has started, and eight in every test would slow all.
`data_dir` is the development data directory, or skips the test.
"""

import os
import pathlib
import socket
import subprocess
import sys

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Tests compile thousands of small programs and run each a few times: without the
# costly passes of the compiler they take a third of the time. Two xdist workers on two
# cores would each start a thread per core, and wait for each other. Set before anything
# imports jax; a user's own flags stay, so XLA_FLAGS= compiles as users do.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
if "PYTEST_XDIST_WORKER" in os.environ:
    FLAGS.append("--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# The same programs are compiled by several modules, by both workers and in the next
# run; the cache of jax knows them by their content, so none can be stale.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
for name, value in CACHE.items():
    os.environ.setdefault(name, value)

# Child processes find the checkout from any directory.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# A first example pays for a compile, so a deadline would only measure that; the same
# examples in every run, so that a failure is a change's and not a day's.
hypothesis.settings.register_profile("jaxllm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxllm")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Lets go of compiled programs: a process that keeps thousands slows to a crawl."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


class NetworkBlockedError(ConnectionError):
    """A test reached for the network."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses every connection except to this machine itself."""
    look_up = socket.getaddrinfo

    def is_local(host):
        return host in (None, "", "localhost", "::1") or str(host).startswith("127.")

    def guarded(connect):
        def guarded_connect(self, address):
            if self.family != socket.AF_UNIX and not is_local(address[0]):
                raise NetworkBlockedError(f"tests use no network: {address[0]}")
            return connect(self, address)

        return guarded_connect

    def guarded_look_up(host, *args, **kwargs):
        if not is_local(host.decode() if isinstance(host, bytes) else host):
            raise NetworkBlockedError(f"tests use no network: {host}")
        return look_up(host, *args, **kwargs)

    for name in ("connect", "connect_ex"):
        method = guarded(getattr(socket.socket, name))
        monkeypatch.setattr(socket.socket, name, method)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The development data: checkpoints, tokenizers, text. Not in the repository."""
    named = os.environ.get("JAXLLM_DATA")
    directory = pathlib.Path(named) if named else ROOT.parent / "shared" / "data"
    if not (directory / "models").is_dir():
        pytest.skip(
            f"no development data in {directory}; JAXLLM_DATA names another directory"
        )
    return directory


@pytest.fixture(scope="session")
def run_with_devices():
    """A function that runs Python code where jax sees a given number of devices."""

    def run(count: int, code: str, timeout: float = 300) -> str:
        """Runs `code` in a child process and returns what it printed.

        The child starts in the repository's root; any failure fails the test and
        shows the child's last words.
        """
        flags = os.environ.get("XLA_FLAGS", "")
        flags = f"{flags} --xla_force_host_platform_device_count={count}"
        child = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if child.returncode != 0:
            pytest.fail(
                f"exit code {child.returncode} with {count} devices\n"
                f"{child.stdout[-2000:]}\n{child.stderr[-6000:]}",
                pytrace=False,
            )
        return child.stdout

    return run
