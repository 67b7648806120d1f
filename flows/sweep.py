"""A sweep: the pipeline for every combination of some settings' values, several runs at once.

Every run is a flow run of its own in a process of its own. What they share is computed once, by the first that comes,
while the others wait for it; stages that train take turns for the slot ``resources.slot``, as all runs do.
"""

import os
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner
from pydantic import Field

from flows.pipeline import pipeline
from rlhf.config import PipelineConfig
from rlhf.errors import ConfigError, RlhfError
from rlhf.plan import Planner
from rlhf.settings import load
from rlhf.stores import open_store
from rlhf.yaml12 import read_mapping, write_value
from tasks.lifetime import end_with
from tasks.prefect_server import flow_run_alive

MOST_RUNS = 1000


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
    store = open_store()
    chosen: dict[str, tuple[tuple[str, ...], PipelineConfig]] = {}
    for number, settings in enumerate(combinations(over), start=1):
        config = load(source, size=size or None, overrides=[*overrides, *settings])
        Planner(config, store).plan()  # what cannot be done is refused before anything is started
        named = config.model_copy(update={"name": f"{config.name[:56]}-{number}"})
        chosen[named.name] = settings, named
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with flow_run_alive(store.home), _runner(where, runs) as runner:
        futures = {name: runner.submit(one, {"config": config}) for name, (_, config) in chosen.items()}
        for name, future in futures.items():
            try:
                done[name] = {"settings": list(chosen[name][0]), **future.result()}
                get_run_logger().info("%s done: %s", name, ", ".join(chosen[name][0]))
            except Exception as error:
                failed[name] = str(error)
                get_run_logger().error("%s failed: %s", name, error)
    if failed:
        words = "; ".join(f"{name} ({', '.join(chosen[name][0])}): {why}" for name, why in failed.items())
        raise RlhfError(f"{len(failed)} of {len(chosen)} runs failed: {words}")
    return done


def _runner(where: str, runs: int) -> TaskRunner[Any]:
    """What starts the runs.

    Raises:
        ConfigError: Ray is not installed.
    """
    if where == "processes":  # none of which outlives this one
        return ProcessPoolTaskRunner(max_workers=runs, initializer=end_with, initargs=(os.getpid(),))
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ConfigError("where is `ray`, but Ray is not installed: pip install 'rlhf-pipeline[ray]'") from None
    runner: TaskRunner[Any] = RayTaskRunner(init_kwargs={"num_cpus": runs})
    return runner
