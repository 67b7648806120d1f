"""What a run keeps in MLflow besides numbers: files, tables, datasets and models that load back.

Everything here gives the same result when it is done twice. A path that is gone raises ``FileNotFoundError``.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.mlflow.server import error_code, tags as tags_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE = "candidate"  # alias of the version of the last finished run
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what MLflow says of a name or alias that is not there

TABLE_ROWS = 1000  # of a table that the UI shows; the Parquet file beside it has them all
SERVING = Path(__file__).with_name("serving.py")
SERVING_LIBRARIES = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas")


def log_artifact(client: MlflowClient, run_id: str, path: Path, destination: str = "") -> None:
    """Copy a file, or the content of a folder, to a folder of the run's artifacts."""
    if path.is_dir():
        client.log_artifacts(run_id, str(path), destination or None)
    elif path.exists():
        client.log_artifact(run_id, str(path), destination or None)
    else:
        raise FileNotFoundError(f"{path} is no longer there")


def log_table(
    client: MlflowClient, run_id: str, path: Path, destination: str = "", scratch: Path | None = None
) -> None:
    """Copy a Parquet file, and its first rows as a table that the UI shows.

    As ``MlflowClient.log_table``, which however appends to a table that is there already.
    """
    import pandas

    log_artifact(client, run_id, path, destination)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder) / f"{path.stem}.json"
        rows = pandas.read_parquet(path).head(TABLE_ROWS)
        rows.to_json(file, orient="split", index=False, date_format="iso")
        client.log_artifact(run_id, str(file), destination or None)
    entry = {"path": f"{destination}/{file.name}".lstrip("/"), "type": "table"}
    tables = json.loads(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
    if entry not in tables:
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*tables, entry]))


def log_dataset(
    client: MlflowClient, run_id: str, name: str, digest: str, source: str, context: str, rows: int | None
) -> None:
    """Record a dataset as an input of the run, by our digest (MLflow keeps the first 36 characters)."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = None if rows is None else json.dumps({"num_rows": rows})
    dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": source}), profile=profile)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def log_model(
    client: MlflowClient,
    run_id: str,
    name: str,
    path: Path,
    digest: str,
    kind: str,
    scratch: Path | None = None,
) -> str:
    """Attach the logged model with this digest to the run; without one, log it from its directory.

    Args:
        client: of the server.
        run_id: the run that the model is an output of.
        name: of the model; characters that MLflow refuses become ``-``.
        path: a Hugging Face directory, with tokenizer. Needed only when no such model has been logged.
        digest: of the directory's content.
        kind: MLflow's ``model_type``, such as ``policy``.
        scratch: where a copy of it has room for a while.

    Returns:
        The id of the logged model: ``mlflow.pyfunc.load_model(f"models:/{id}")`` loads it.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = client.get_run(run_id)
    query = f"tags.`rlhf.digest` = '{digest}'"
    known = client.search_logged_models([run.info.experiment_id], query)
    ready = [model for model in known if model.status == LoggedModelStatus.READY]
    if ready:
        model = ready[0]
    else:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no longer there")
        for half_written in known:
            client.delete_logged_model(half_written.model_id)
        tags = {"rlhf.digest": digest, "rlhf.kind": kind}
        model_name = name.translate(str.maketrans("/:.%\"'", "------"))
        model = client.create_logged_model(run.info.experiment_id, model_name, run_id, tags, model_type=kind)
        _send_model(client, model, path, scratch)
    if model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def _send_model(client: MlflowClient, model: LoggedModel, path: Path, scratch: Path | None) -> None:
    """Make an MLflow model of a directory and ``serving.py``, and hand it over.

    The parts of ``mlflow.pyfunc.log_model`` without its active run and without guessing requirements, for which
    it would load the model.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about type hints, its own (on import) and those that predict() is to have
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ParamSchema, ParamSpec

        from tasks.mlflow import serving

        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        params = serving.SCORING if serving.is_reward_model(config) else serving.GENERATION
        # Without a schema of them, MLflow does not pass params on.
        types = {int: "long", float: "double"}
        schema = ParamSchema([ParamSpec(name, types[type(default)], default) for name, default in params.items()])
        target = str(Path(folder) / "model")
        mlflow.pyfunc.save_model(
            target,
            python_model=str(SERVING),
            artifacts={"model": str(path)},
            # Without "+cpu" and the like: an index of packages has the version only.
            pip_requirements=[f"{library}=={version(library).split('+')[0]}" for library in SERVING_LIBRARIES],
            signature=ModelSignature(params=schema),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=model.source_run_id,
            ),
        )
        client.log_model_artifacts(model.model_id, target)
    client.finalize_logged_model(model.model_id, "READY")


def register(
    client: MlflowClient,
    run_id: str,
    *,
    registered: str,
    about: str,
    name: str,
    path: Path,
    digest: str,
    kind: str,
    note: str,
    tags: Mapping[str, str],
    scratch: Path | None = None,
) -> str:
    """Make the model with this digest a version of a registered model, unless it is one; alias ``candidate``.

    Args:
        client: of the server.
        run_id: the MLflow run that the model is an output of.
        registered: name of the registered model; made if need be, with the description ``about``.
        about: what the registered model is, in Markdown.
        name: this, ``path``, ``digest``, ``kind`` and ``scratch`` are as in :func:`log_model`.
        path: of the model's directory.
        digest: of its content.
        kind: what it is for.
        note: description of the version, in Markdown.
        tags: of the version; ``rlhf.run_id`` is the id of the pipeline run, which sorts by time.
        scratch: where a copy of it has room for a while.

    Returns:
        The number of the version.
    """
    model_id = log_model(client, run_id, name, path, digest, kind, scratch)
    _make_registered_model(client, registered, about)
    found = version_of(client, registered, digest)
    if found is None:
        source = client.get_logged_model(model_id).artifact_location
        every = tags_of({**tags, "rlhf.digest": digest})
        found = client.create_model_version(registered, source, run_id, every, description=note, model_id=model_id)
    _make_candidate(client, registered, found, tags["rlhf.run_id"])
    return str(found.version)


def _make_registered_model(client: MlflowClient, name: str, about: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error_code(error) not in ABSENT:
            raise
        try:
            client.create_registered_model(name, description=about)
        except MlflowException as other:
            if error_code(other) != "RESOURCE_ALREADY_EXISTS":  # another run may have made it meanwhile
                raise


def _make_candidate(client: MlflowClient, name: str, made: ModelVersion, run_id: str) -> None:
    """Give the version the alias, unless that of a later run has it: journals may come late."""
    number = client.get_registered_model(name).aliases.get(CANDIDATE)
    holder = client.get_model_version(name, number).tags if number is not None else {}
    last = max(run_id, made.tags.get("rlhf.last_run_id", ""))
    client.set_model_version_tag(name, made.version, "rlhf.last_run_id", last)
    if run_id >= holder.get("rlhf.last_run_id", ""):
        client.set_registered_model_alias(name, CANDIDATE, made.version)


def version_of(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    """The version with this digest, the first one if a request was carried out twice."""
    found = client.search_model_versions(f"name = '{name}' and tags.`rlhf.digest` = '{digest}'")
    return min(found, key=lambda one: int(one.version), default=None)
