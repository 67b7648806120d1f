"""A sweep: the pipeline for every combination of some settings' values, several runs at once.

Every run is a flow run of its own in a process of its own. What they share is computed once, by the first that comes,
while the others wait for it; stages that train take turns for the slot ``resources.slot``, as all runs do.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import islice, product
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner
from pydantic import Field

from flows.pipeline import pipeline
from rlhf.cache import Planner
from rlhf.config import PipelineConfig, load, read_mapping, write_value
from rlhf.errors import ConfigError, RlhfError
from rlhf.store import open_store
from tasks.prefect.cancelling import cancellable
from tasks.prefect.flow_runs import flow_run_alive
from tasks.prefect.project import enter_project
from tasks.processes.lifetime import end_with
from tasks.processes.stopping import STOP_SECONDS

MOST_RUNS = 1000
END_SECONDS = STOP_SECONDS + 3.0  # for all runs to end with a checkpoint, when the sweep is stopped
Runner = TaskRunner[Any]
Futures = dict[str, PrefectFuture[Any]]  # by the name of the run


def combinations(over: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values of ``over``, each as overrides, the last setting changing fastest.

    Args:
        over: settings with their values, such as ``ppo.kl_coef=[0.01, 0.05]``.

    Raises:
        ConfigError: one is not of that form, or there are more than ``MOST_RUNS`` combinations.
    """
    axes: list[list[str]] = []
    for text in over:
        name, _, raw = text.partition("=")
        values: Any = read_mapping(f"values: {raw}", f"--over {name}")[0]["values"] if raw else None
        if not isinstance(values, list) or not values:
            raise ConfigError(f"--over {text!r}: expected KEY=[VALUE, ...], for example ppo.kl_coef=[0.01, 0.05, 0.1]")
        axes.append([f"{name.strip()}={write_value(value)}" for value in values])
    found = list(product(*axes))
    if not axes or len(found) > MOST_RUNS:
        raise ConfigError(f"--over: these are {len(found) if axes else 0} runs; 1 to {MOST_RUNS} are possible")
    return found


@task(name="run", task_run_name="{config.name}")
def one(config: PipelineConfig) -> dict[str, Any]:
    """One run of the pipeline."""
    return pipeline(config)


@flow(name="sweep", flow_run_name="sweep {source}", validate_parameters=True, persist_result=False)
@cancellable
def sweep(
    source: str = "demo",
    size: str = "",
    overrides: list[str] = [],  # noqa: B006, RUF100 - Prefect shows the default in its form
    over: list[str] = ["ppo.kl_coef=[0.02, 0.05, 0.1]"],  # noqa: B006, RUF100
    runs: Annotated[int, Field(ge=1)] = 2,
    where: Literal["processes", "ray"] = "processes",
) -> dict[str, dict[str, Any]]:
    """The pipeline for every combination of some settings' values; what the runs share is computed once.

    Args:
        source: A preset, or a YAML file on the worker's machine.
        size: A size that it offers; empty for the full one.
        overrides: Settings that differ in all runs, such as `ppo.updates=50`.
        over: Settings with the values to try, such as `ppo.kl_coef=[0.02, 0.05, 0.1]`.
        runs: Most runs at once.
        where: `processes` of this machine, or a `ray` cluster that sees the same home folder.

    Returns:
        By the name of each run: its settings, and what ``pipeline`` returns.

    Raises:
        InputError: a setting is wrong; no run is started then.
        RlhfError: runs failed; the message names them. The others came to their end.
    """
    enter_project()
    store = open_store()
    chosen: dict[str, tuple[tuple[str, ...], PipelineConfig]] = {}
    for number, settings in enumerate(combinations(over), start=1):
        config = load(source, size=size or None, overrides=[*overrides, *settings])
        Planner(config, store).plan()  # what cannot be done is refused before anything is started
        named = config.model_copy(update={"name": f"{config.name[:56]}-{number}"})
        chosen[named.name] = settings, named
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    futures: Futures = {}
    carried = _processes(runs) if where == "processes" else _on_ray(runs, store.home, futures)
    with flow_run_alive(store.home), carried as runner:
        for name, run in _ended(runner, {name: config for name, (_, config) in chosen.items()}, runs, futures):
            try:
                done[name] = {"settings": list(chosen[name][0]), **run.result()}
                get_run_logger().info("%s done: %s", name, ", ".join(chosen[name][0]))
            except Exception as error:
                failed[name] = str(error)
                get_run_logger().error("%s failed: %s", name, error)
    if failed:
        words = "; ".join(f"{name} ({', '.join(chosen[name][0])}): {why}" for name, why in failed.items())
        raise RlhfError(f"{len(failed)} of {len(chosen)} runs failed: {words}")
    return {name: done[name] for name in chosen}


def _ended(
    runner: Runner, configs: Mapping[str, PipelineConfig], runs: int, futures: Futures
) -> Iterator[tuple[str, PrefectFuture[Any]]]:
    """Each run as soon as it has ended; at most ``runs`` are under way at once, whatever room a cluster has.

    ``futures`` gets those that were started.
    """
    ended: SimpleQueue[str] = SimpleQueue()
    waiting = iter(configs.items())

    def start(most: int) -> None:
        for name, config in islice(waiting, most):
            futures[name] = runner.submit(one, {"config": config})
            futures[name].add_done_callback(lambda _, name=name: ended.put(name))  # type: ignore[misc]

    start(runs)
    for _ in configs:
        name = ended.get()
        start(1)
        yield name, futures[name]


@contextmanager
def _processes(runs: int) -> Iterator[Runner]:
    """Carries runs in processes of this machine, none of which outlives this one.

    By itself, Prefect waits for the end of every run, even if the sweep is cancelled.
    """
    others = set(active_children())
    with ProcessPoolTaskRunner(max_workers=runs, initializer=_begin, initargs=(os.getpid(),)) as runner:
        try:
            yield runner
        except BaseException:
            _end_all_but(others)
            raise


def _begin(parent: int) -> None:
    """What the process of a run does first: Ctrl-C in the terminal is the sweep's alone, which ends it by SIGTERM."""
    os.setpgrp()
    end_with(parent)


def _end_all_but(others: Set[BaseProcess], seconds: float = END_SECONDS) -> None:
    """End the processes of runs: asked to first, as if each run was cancelled, made to after so many seconds."""
    deadline = time.monotonic() + seconds
    asked: set[BaseProcess] = set()
    while alive := set(active_children()) - others:
        for process in alive - asked:
            process.terminate()
        asked |= alive
        if time.monotonic() > deadline:
            for process in alive:
                process.kill()
        time.sleep(0.05)


@contextmanager
def _on_ray(runs: int, home: Path, futures: Futures) -> Iterator[Runner]:
    """Carries runs on the Ray cluster of RAY_ADDRESS or of this machine; on one of its own, where there is none.

    Where it is left early, the ``futures`` are interrupted first, as if by Ctrl-C: a training leaves a checkpoint.

    Raises:
        ConfigError: Ray is not installed, or the cluster of RAY_ADDRESS does not answer.
    """
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ConfigError("where is `ray`, but Ray is not installed: pip install 'rlhf-pipeline[ray]'") from None
    ours = {name: value for name, value in os.environ.items() if name.startswith("RLHF_")} | {"RLHF_HOME": str(home)}
    environment = {"env_vars": ours}  # a cluster that is there has that of whoever started it
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="auto", runtime_env=environment)
    except ConnectionError as error:
        if address := os.environ.get("RAY_ADDRESS"):
            raise ConfigError(
                f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there ({error}); start it, or unset "
                "RAY_ADDRESS, and the runs are on this machine"
            ) from None
        ray.init(address="local", num_cpus=runs, runtime_env=environment)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end this process at once
    try:
        with RayTaskRunner() as runner:
            yield runner
    except BaseException:
        references = [future.wrapped_future for future in futures.values()]  # type: ignore[attr-defined]
        for reference in references:
            ray.cancel(reference)
        ray.wait(references, num_returns=len(references), timeout=END_SECONDS)
        raise
    finally:
        ray.shutdown()
