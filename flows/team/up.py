"""``rlhf up``: everything that a team works with, on one machine and by one command, until Ctrl-C.

A Prefect server with its UI, an MLflow server, the deployments, and a worker that runs what people and schedules ask
for. All state is below the home folder: ``prefect/`` and ``mlflow.db`` (or a PostgreSQL database), ``logs/``. What dies
is started again. At the end, runs that are going on are cancelled, and those that cannot be are marked as crashed, so
that none is left as Running.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import parse_qsl, urlencode

import psutil
from rich.console import Console

from flows.team.children import Child
from flows.team.heartbeats import SERVER_ENVIRONMENT
from flows.team.server import configure
from rlhf.errors import ConfigError
from rlhf.store import home_directory, open_store, try_lock, unlock
from tasks.mlflow.server import UI_URL, default_uri, for_browsers, without_password
from tasks.prefect.project import PROJECT

LOCK, STATE = "up.lock", "up.json"
EVERYWHERE = "0.0.0.0"  # every address of this machine; no browser opens it
WORKER = f"rlhf-up-{socket.gethostname()}"
READY_SECONDS = 180.0
LOOK_SECONDS = 10.0  # between two looks at runs that are being cancelled
GONE = "the process of the run {} is gone: its state is corrected"
STOP_SECONDS = 20.0  # for running stages to write a checkpoint and end, when all is stopped


@dataclass(frozen=True)
class Addresses:
    """Where things are, of an ``rlhf up`` that is going on: the content of ``up.json``."""

    pid: int
    prefect: str
    mlflow: str
    home: str


def up(options: argparse.Namespace, console: Console) -> int:
    """Start all of it, and stay until it is ended; the exit code."""
    home = home_directory(options.home)
    open_store(options.home)  # a shared store that cannot be used is said now, and not by every run
    home.mkdir(parents=True, exist_ok=True)
    lock = try_lock(home / LOCK)
    if lock is None:
        return _already(home, console)
    try:
        (home / STATE).unlink(missing_ok=True)  # of one that was killed
        _check_ports(options)
        return _serve(options, _set_environment(home, options), console)
    finally:
        (home / STATE).unlink(missing_ok=True)
        unlock(lock)


def _already(home: Path, console: Console) -> int:
    """Say what another ``rlhf up`` on this home folder has started."""
    deadline = time.monotonic() + READY_SECONDS
    while not (home / STATE).exists() and time.monotonic() < deadline:
        time.sleep(0.2)  # it is just starting
    found = Addresses(**json.loads((home / STATE).read_text("utf-8")))
    console.print(f"rlhf up is there already (process {found.pid}) on {home}", highlight=False, soft_wrap=True)
    _print_addresses(found, console)
    return 0


def _print_addresses(addresses: Addresses, console: Console) -> None:
    console.print(f"  Prefect  {addresses.prefect}", highlight=False, soft_wrap=True)
    console.print(f"  MLflow   {addresses.mlflow}", highlight=False, soft_wrap=True)
    console.print(f"  Logs     {Path(addresses.home) / 'logs'}", highlight=False, soft_wrap=True)


def _check_ports(options: argparse.Namespace) -> None:
    """See that both ports are free.

    Raises:
        ConfigError: one is not.
    """
    if options.prefect_port == options.mlflow_port:
        raise ConfigError(f"--prefect-port and --mlflow-port are both {options.mlflow_port}; choose two ports")
    for option, port in (("--prefect-port", options.prefect_port), ("--mlflow-port", options.mlflow_port)):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((options.host, port))
            except (OSError, OverflowError) as error:
                why = error.strerror if isinstance(error, OSError) else "ports are 1 to 65535"
                raise ConfigError(
                    f"{option} {port}: cannot listen on {options.host}:{port} ({why}); end the program that does, or "
                    f"choose another port with {option}"
                ) from None


def _set_environment(home: Path, options: argparse.Namespace) -> Addresses:
    """What this process and its children work with; the addresses for people, of which the user may name others."""
    here = "127.0.0.1" if options.host == EVERYWHERE else options.host
    there = _outward_address() if options.host == EVERYWHERE else options.host
    os.environ |= {
        "RLHF_HOME": str(home),
        "PREFECT_API_URL": f"http://{here}:{options.prefect_port}/api",
        "MLFLOW_TRACKING_URI": f"http://{here}:{options.mlflow_port}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    prefect = os.environ.setdefault("PREFECT_UI_URL", f"http://{there}:{options.prefect_port}")
    mlflow = os.environ.setdefault(UI_URL, f"http://{there}:{options.mlflow_port}")
    configure(home)
    return Addresses(os.getpid(), prefect, mlflow, str(home))


def _outward_address() -> str:
    """This machine's address on the way to others; that of the loopback where there is none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737)
        except OSError:
            return "127.0.0.1"
        return str(way.getsockname()[0])


def _browsers(options: argparse.Namespace) -> dict[str, str]:
    """What MLflow's server is told of the addresses by which browsers reach it."""
    hosts = [options.host]
    if options.host == EVERYWHERE:
        own = (one.address for many in psutil.net_if_addrs().values() for one in many if one.family == socket.AF_INET)
        hosts = [*own, socket.gethostname(), socket.getfqdn()]
    return for_browsers([os.environ[UI_URL], *(f"http://{host}:{options.mlflow_port}" for host in hosts)])


def _programs(options: argparse.Namespace, home: Path) -> tuple[Child, Child, Child]:
    """Prefect's server, MLflow's server and the worker."""
    url: str | None = options.database_url
    python, logs = sys.executable, home / "logs"
    prefect_environment = {
        **SERVER_ENVIRONMENT,
        "PREFECT_SERVER_UI_API_URL": "/api",  # the UI asks the server that it came from, on whatever port
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
    }
    mlflow_store = default_uri(home)
    if url is not None:
        scheme, _, rest = url.partition("://")
        if not scheme.startswith("postgresql") or not rest:
            raise ConfigError(f"--database-url {scheme}://...: must be postgresql://user@host:port/name")
        prefect_environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = _prefect_database(rest)
        mlflow_store = _mlflow_database(rest)
    address = ("--host", options.host, "--port")
    prefect = Child(
        "Prefect",
        [python, "-m", "prefect", "server", "start", *address, str(options.prefect_port)],
        prefect_environment,
        logs / "prefect.log",
    )
    mlflow = Child(
        "MLflow",
        [
            *(python, "-m", "mlflow", "server", *address, str(options.mlflow_port), "--workers", "1"),
            *("--artifacts-destination", (home / "mlartifacts").as_uri()),
        ],
        # The address of the database may hold a password, which a command line would show to everyone.
        {
            "MLFLOW_BACKEND_STORE_URI": mlflow_store,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **_browsers(options),
        },
        logs / "mlflow.log",
    )
    from flows.team.deployments import POOL

    worker = Child(
        "the worker",
        [
            *(python, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"),
            *("--limit", str(options.runs), "--name", WORKER),
        ],
        {
            PROJECT: os.environ.get(PROJECT) or str(Path.cwd()),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
        },
        logs / "worker.log",
    )
    return prefect, mlflow, worker


def _prefect_database(rest: str) -> str:
    """The address of Prefect's tables, as asyncpg takes it: it has another name for ``sslmode``, and no other options.

    Args:
        rest: user, host, port and name of the database, as in ``--database-url``.

    Raises:
        ConfigError: an option that asyncpg does not have.
    """
    place, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    if other := sorted(options.keys() - {"sslmode", "host", "port", "user", "password"}):
        raise ConfigError(
            f"--database-url: the option {other[0]!r} is not one that Prefect and MLflow both take; sslmode is. Others "
            "belong into the environment, as PGSSLROOTCERT and PGPASSWORD"
        )
    if "sslmode" in options:
        options["ssl"] = options.pop("sslmode")
    return f"postgresql+asyncpg://{place}{'?' if options else ''}{urlencode(options)}"


def _mlflow_database(rest: str) -> str:
    """The address of MLflow's tables: in a schema of their own, as some of Prefect's have the same names.

    Args:
        rest: user, host, port and name of the database, as in ``--database-url``.

    Raises:
        ConfigError: the driver is missing, or the database cannot be reached.
    """
    try:
        import psycopg2
    except ImportError:
        raise ConfigError(
            "--database-url: MLflow needs psycopg2 for PostgreSQL; pip install 'rlhf-pipeline[postgres]'"
        ) from None
    try:
        with closing(psycopg2.connect(f"postgresql://{rest}", connect_timeout=30)) as connection, connection:
            connection.cursor().execute("CREATE SCHEMA IF NOT EXISTS mlflow")
    except psycopg2.Error as error:
        raise ConfigError(
            f"--database-url: PostgreSQL does not answer, or refuses: {without_password(str(error).strip())}; write "
            "postgresql://user@host:port/name, of a database in which the user may make schemas and tables"
        ) from None
    return f"postgresql+psycopg2://{rest}{'&' if '?' in rest else '?'}options=-csearch_path%3Dmlflow"


def _serve(options: argparse.Namespace, addresses: Addresses, console: Console) -> int:
    """Start all, look after it, and end it at a signal."""
    home = Path(addresses.home)
    prefect, mlflow, worker = _programs(options, home)
    stopping = _Stop()
    try:
        for child in (prefect, mlflow):  # side by side: each takes seconds
            child.start()
            console.print(f"starting {child.name} ...", highlight=False)
        for child, url in ((prefect, "PREFECT_API_URL"), (mlflow, "MLFLOW_TRACKING_URI")):
            _wait_until_ready(child, f"{os.environ[url]}/health", stopping)
        import httpx
        from prefect.exceptions import PrefectHTTPStatusError

        from flows.team.deployments import apply, shipped
        from flows.team.reaper import reap, reap_cancelled, reap_killed, reap_unbegun

        made = apply(shipped())
        _go_on(home, console)  # if one was killed while it stopped

        def clear() -> None:
            """End what the worker carried, or was just starting, when it died."""
            for name in reap(WORKER):
                console.print(GONE.format(name), highlight=False)

        clear()
        worker.before_revival = clear
        worker.start()
        (home / STATE).write_text(json.dumps(asdict(addresses)), "utf-8")
        console.print(f"\nready; {len(made)} deployments", highlight=False)
        _print_addresses(addresses, console)
        console.print("Ctrl-C ends all of it.")
        looked = time.monotonic()
        while not stopping.asked:
            with suppress(httpx.HTTPError, PrefectHTTPStatusError):  # Prefect does not answer: the next time, then
                for child in (prefect, mlflow, worker):
                    if news := child.revive():
                        console.print(news, highlight=False, soft_wrap=True)
                gone = reap_killed()
                if time.monotonic() - looked > LOOK_SECONDS:
                    gone, looked = gone + reap_cancelled() + reap_unbegun(WORKER), time.monotonic()
                for name in gone:
                    console.print(GONE.format(name), highlight=False)
            time.sleep(0.5)
    except _StoppedError:
        pass
    finally:
        console.print("\nstopping ...")
        asked = prefect.exit_code is None and worker.pid is not None
        if asked:
            _end_runs(home, console)
        worker.stop()
        if asked:
            _go_on(home, console)
        for child in (mlflow, prefect):
            child.stop()
    return 0


class _StoppedError(Exception):
    """All is to end while it is being started."""


class _Stop:
    """Whether Ctrl-C or SIGTERM came; a second Ctrl-C is not needed, and changes nothing."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _wait_until_ready(child: Child, url: str, stopping: _Stop) -> None:
    """Return when a server answers.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    import httpx

    deadline = time.monotonic() + READY_SECONDS
    with httpx.Client(timeout=5) as client:  # one: it reads all certificates first, which takes longer than to ask
        while time.monotonic() < deadline:
            if stopping.asked:
                raise _StoppedError
            if child.exit_code is not None:
                raise RuntimeError(f"{child.name} ended with exit code {child.exit_code}; see {child.log}")
            with suppress(httpx.HTTPError):
                if client.get(url).is_success:
                    return
            time.sleep(0.2)
    raise RuntimeError(f"{child.name} does not answer at {url}; see {child.log}")


def _end_runs(home: Path, console: Console) -> None:
    """Cancel what is running, and wait for it; what does not end is marked as crashed, and what waits stays waiting."""
    from flows.team.reaper import cancel_all, pause

    try:
        pause(home)
        cancelled, crashed = cancel_all(STOP_SECONDS)
    except Exception as error:
        console.print(f"Prefect does not answer, so its runs could not be ended: {error}", highlight=False)
        return
    for names, verb in ((cancelled, "cancelled"), (crashed, "marked as crashed")):
        if names:
            console.print(f"{verb}: {', '.join(names)}; the same run goes on from its last checkpoint", highlight=False)


def _go_on(home: Path, console: Console) -> None:
    """Let workers begin runs again, if this or an earlier ``rlhf up`` has paused them."""
    from flows.team.reaper import go_on

    try:
        go_on(home)
    except Exception as error:
        console.print(f"Prefect does not answer, so runs begin again with the next rlhf up: {error}", highlight=False)
