"""MLflow's model registry: its alias ``champion``, and the way from a registered model back to files.

The registered models are ``<pipeline>`` and ``<pipeline>-reward``; a run registers its own, by its journal
(``tasks.mlflow.files.register``). The alias ``champion`` follows ``rlhf.champions.ledger``, which is the truth, so
that MLflow being away changes nothing: what it was not told is told by the next run or command. All of it may be done
twice.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.champions import Change, Considered, Contender, ledger as champion, registered_names
from rlhf.errors import ArtifactError, ConfigError
from rlhf.store import Store, digest_of, manifest_of
from tasks.mlflow.files import ABSENT, version_of
from tasks.mlflow.journal import JOURNAL, PARENT
from tasks.mlflow.server import brief, connect, error_code, tags as tags_of, without_password
from tasks.mlflow.sync import Shipped, ship

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

CHAMPION = "champion"  # alias


# ------------------------------------------------------------------------------------------------------------- telling
def tell(home: Path, pipeline: str, tracking_uri: str) -> bool:
    """Tell MLflow what it does not know yet of a pipeline's champions and of its last candidate.

    Returns:
        Whether it knows all now. What it could not be told is logged, and stays to be told.
    """
    try:
        if is_told(home, pipeline):
            return True
        client = connect(tracking_uri)
        known = champion.history(home, pipeline)
        for number, change in enumerate(known.changes[known.told :], known.told + 1):
            _ship(home, change.champion.run_id, tracking_uri)
            _tell_change(client, Store(home), pipeline, change)
            champion.told(home, pipeline, changes=number)
        last = champion.considered(home, pipeline)
        if last is not None and not last.told:
            _ship(home, last.candidate.run_id, tracking_uri)
            _tell_verdict(client, Store(home), pipeline, last)
            champion.told(home, pipeline, candidate=last.candidate.run_id)
    except Exception as error:
        where = without_password(tracking_uri)
        log.warning("MLflow at %s does not know the champion of %s yet: %s", where, pipeline, brief(error))
        return False
    return True


def is_told(home: Path, pipeline: str) -> bool:
    """Whether MLflow knows all of a pipeline's champions and its last candidate."""
    known, last = champion.history(home, pipeline), champion.considered(home, pipeline)
    return known.told == len(known.changes) and (last is None or last.told)


def _ship(home: Path, run_id: str, tracking_uri: str) -> None:
    """See that a run's models are registered, as far as its journal is here."""
    directory = home / "runs" / run_id
    if (directory / JOURNAL).exists() and not ship(directory, tracking_uri).complete:
        raise RuntimeError(f"not all of the run {run_id} is there")


def _tell_change(client: MlflowClient, store: Store, pipeline: str, change: Change) -> None:
    facts = {
        "champion.event": change.event,
        "champion.when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(change.when)),
        "champion.who": change.who,
        "champion.why": " ".join(change.why),
        "champion.previous": change.previous or "none",
    }
    versions = _versions(client, store, pipeline, change.champion)
    for name, version in versions.items():
        for key, value in tags_of(facts).items():
            client.set_model_version_tag(name, version.version, key, value)
        client.set_registered_model_alias(name, CHAMPION, version.version)
    for name in {pipeline, f"{pipeline}-reward"} - versions.keys():  # it is no longer that of an earlier champion
        _drop_alias(client, name)


def _tell_verdict(client: MlflowClient, store: Store, pipeline: str, considered: Considered) -> None:
    verdict, why = "promoted" if considered.promoted else "refused", " ".join(considered.why)
    for name, version in _versions(client, store, pipeline, considered.candidate).items():
        for key, value in tags_of({"gate": verdict, "gate.why": why}).items():
            client.set_model_version_tag(name, version.version, key, value)
    run_id = Shipped.read(store.home / "runs" / considered.candidate.run_id).runs.get(PARENT)
    if run_id is not None:
        note = client.get_run(run_id).data.tags.get("mlflow.note.content", "")
        kept = re.sub(r"\n*The gate: .*", "", note, flags=re.DOTALL)
        tags = {"rlhf.gate": verdict, "mlflow.note.content": f"{kept}\n\nThe gate: {verdict}. {why}".strip()}
        for key, value in tags_of(tags).items():
            client.set_tag(run_id, key, value)


def _versions(client: MlflowClient, store: Store, pipeline: str, contender: Contender) -> dict[str, ModelVersion]:
    """The versions of a run's models by the name of the registered model; one that is not there is logged."""
    found = {}
    for stage, name in registered_names(pipeline, contender).items():
        known = store.remembered(stage, contender.keys[stage])
        version = version_of(client, name, known.parts.get("model", "")) if known else None
        if version is None:
            log.warning("MLflow has no version of %s that is the %s of run %s", name, stage, contender.run_id)
        else:
            found[name] = version
    return found


def _drop_alias(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        if CHAMPION in client.get_registered_model(name).aliases:
            client.delete_registered_model_alias(name, CHAMPION)
    except MlflowException as error:
        if error_code(error) not in ABSENT:
            raise


# ------------------------------------------------------------------------------------------------------------- finding
class Registered(NamedTuple):
    """A version of a registered model."""

    name: str
    version: str
    source: str  # of its MLflow model
    tags: Mapping[str, str]


def directory(store: Store, uri: str, tracking_uri: str) -> Path:
    """The Hugging Face directory of a registered model, ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.

    It is the artifact in the store where that has it, else a download, kept in ``<home>/models/<digest>``.

    Raises:
        ConfigError: the URI has another form, MLflow cannot be asked, or there is no such model, alias or version.
        ArtifactError: what was downloaded is not what was registered.
    """
    found = _find(uri, tracking_uri)
    stage, key, digest = (found.tags.get(f"rlhf.{name}", "") for name in ("stage", "key", "digest"))
    try:
        if stage and key and store.open(stage, key).parts.get("model") == digest:
            return store.path(stage, key) / "model"
    except ArtifactError:
        pass
    if not digest:
        raise ConfigError(f"{uri} is version {found.version} of {found.name}, which no run of this package has made")
    kept = store.downloads / digest
    if not kept.is_dir():
        _download(found, digest, kept, tracking_uri)
    os.utime(kept)  # it is in use
    return kept


def _find(uri: str, tracking_uri: str) -> Registered:
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", uri)
    if match is None:
        raise ConfigError(f"{uri!r} names no model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match["name"], match["alias"], match["version"]
    file = Path(tracking_uri.removeprefix("sqlite:///"))
    if tracking_uri.startswith("sqlite:///") and not file.exists():
        raise ConfigError(f"{uri}: there is no MLflow store {file}; `rlhf run` makes it, or set MLFLOW_TRACKING_URI")
    try:
        client = connect(tracking_uri)
        aliases = _aliases(client, name)
        if aliases is None:
            known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
            raise ConfigError(f"{uri}: MLflow has no registered model {name!r}; it has: {known}")
        if alias is not None and alias not in aliases:
            known = ", ".join(f"@{one}" for one in sorted(aliases)) or "none"
            hint = "; `rlhf champion promote` makes one" if alias == CHAMPION else ""
            raise ConfigError(f"{uri}: {name!r} has no alias {alias!r}; it has: {known}{hint}")
        return _read(client, uri, name, str(aliases[alias] if alias else version))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{uri}: MLflow at {without_password(tracking_uri)} cannot be asked ({brief(error)}); is it up? "
            "MLFLOW_TRACKING_URI says where it is"
        ) from None


def _aliases(client: MlflowClient, name: str) -> dict[str, Any] | None:
    """The version of each alias of a registered model; None where there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error_code(error) not in ABSENT:
            raise
        return None


def _read(client: MlflowClient, uri: str, name: str, version: str) -> Registered:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, version)
    except MlflowException as error:
        if error_code(error) not in ABSENT:
            raise
        raise ConfigError(f"{uri}: {name!r} has no version {version}") from None
    return Registered(name, str(found.version), str(found.source), dict(found.tags))


def _download(found: Registered, digest: str, kept: Path, tracking_uri: str) -> None:
    """Fetch the directory inside of the MLflow model, and see that it is the one that was registered."""
    from mlflow.artifacts import download_artifacts

    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        where = f"{found.source}/artifacts/model"
        try:
            made = Path(download_artifacts(artifact_uri=where, dst_path=folder, tracking_uri=tracking_uri))
        except Exception as error:
            raise ConfigError(
                f"version {found.version} of {found.name} cannot be downloaded from {where}: {brief(error)}"
            ) from None
        files = {f"model/{name}": {"sha256": file["sha256"]} for name, file in manifest_of(made).items()}
        if digest_of(files) != digest:
            raise ArtifactError(f"version {found.version} of {found.name}: {where} is not what was registered")
        if not kept.exists():  # another process may have been faster
            shutil.move(made, kept)
