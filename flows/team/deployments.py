"""The deployments of this package on a Prefect server: what its UI offers to run, and the work pool that runs it.

``preset/run`` takes a preset by name. ``pipeline/<name>`` is a whole configuration as a form: one for each preset
whose data needs no file of the user's, and one for each configuration that ``rlhf deploy`` is given. Applying them
again changes what differs and makes nothing twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from flows.team.heartbeats import ENVIRONMENT, TAG, look_after_runs
from rlhf.config import KINDS, PipelineConfig, load, presets
from rlhf.errors import ConfigError
from rlhf.store import DEMO_PREFIX, HUB_PREFIX
from tasks.prefect.server import make_pool

POOL = "rlhf"
TAGS = [TAG]
JOB = {"env": ENVIRONMENT}  # of runs, whoever has started their worker


class Applied(NamedTuple):
    """A deployment that is on the server now."""

    name: str  # <flow>/<deployment>
    id: str


def shipped() -> list[PipelineConfig]:
    """The presets whose data is the demo's or the hub's, so that they run as they are."""
    configs = (load(name) for name in presets())
    return [config for config in configs if all(map(_is_everywhere, _sources(config)))]


def schedule(config: PipelineConfig, cron: str, timezone: str, pool: str = POOL) -> Applied:
    """Put ``retrain/<name>`` on the server, which looks at these times whether there is anything new to learn.

    Of runs that are due at the same time, as after a night without a worker, one runs and the others are cancelled.

    Raises:
        ConfigError: the times or the time zone cannot be read.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.retrain import retrain

    make_pool(pool)
    look_after_runs()
    try:
        one = RunnerDeployment.from_flow(
            retrain,
            config.name,
            description=retrain.description,
            tags=TAGS,
            parameters={"config": config.model_dump(mode="json")},
            schedules=[Cron(cron, timezone=timezone, slug="cron")],  # by its slug, the one that is there is changed
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            work_pool_name=pool,
            job_variables=JOB,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:
        raise ConfigError(
            f"--cron {cron!r} --timezone {timezone!r}: {error}; write five fields, such as `0 3 * * *` for three "
            "o'clock every night, and a zone such as Europe/Berlin"
        ) from None
    return Applied(f"{one.flow_name}/{one.name}", str(one.apply()))


def apply(configs: Iterable[PipelineConfig], pool: str = POOL) -> list[Applied]:
    """Put the work pool, ``preset/run`` and one deployment for each configuration on the server of ``PREFECT_API_URL``.

    So are the automations that look after runs. A work pool that is there is left as it is, whatever its type.
    """
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from flows.pipeline import pipeline, preset

    make_pool(pool)
    look_after_runs()
    made = [
        RunnerDeployment.from_flow(
            preset,
            "run",
            description=preset.description,
            tags=TAGS,
            work_pool_name=pool,
            job_variables=JOB,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    ]
    made += [
        RunnerDeployment.from_flow(
            pipeline,
            config.name,
            description=pipeline.description,
            tags=TAGS,
            parameters={"config": config.model_dump(mode="json")},
            work_pool_name=pool,
            job_variables=JOB,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for config in configs
    ]
    return [Applied(f"{one.flow_name}/{one.name}", str(one.apply())) for one in made]


def _sources(config: PipelineConfig) -> list[str]:
    return [source for kind in KINDS for source in getattr(config.data, kind)]


def _is_everywhere(source: str) -> bool:
    """Whether a source is there on any machine."""
    return os.fspath(source).startswith((DEMO_PREFIX, HUB_PREFIX))
