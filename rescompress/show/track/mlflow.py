"""MLflow: settings as parameters, every stage's figures and training curves as metrics, files as artifacts.

The address is a tracking URI (``sqlite:///runs.db``, ``http://host:5000``) or a folder, with the experiment after ``#``. In a
folder we keep a SQLite store, since MLflow 3 refuses its own older file store; one that is there already is passed on as it is.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rescompress.core.errors import EnvironmentFailed, ToolMissing
from rescompress.core.manifest import MANIFEST_NAME, Manifest
from rescompress.show.figures.columns import provenance
from rescompress.show.track._curves import curves, figures, settings

EXPERIMENT = "rescompress"
RUN_TAG = "rescompress.run"
LONGEST_TEXT = 500
"""Of a parameter or tag: what every MLflow store takes."""
BATCH = 100
"""Parameters, metrics or tags per call: what every MLflow store takes."""


def check(address: str) -> None:
    """Make sure that MLflow is installed.

    Raises:
        ToolMissing: It is not.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ToolMissing("MLflow is not installed", where=f"mlflow:{address}", remedy="pip install 'rescompress[mlflow]'")


def log(address: str, name: str, folder: Path, manifest: Manifest) -> str:
    """Record a run in MLflow and return in words where; a run that is there already is not recorded twice.

    Raises:
        EnvironmentFailed: The store cannot be reached, or refuses.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    place, _, experiment = address.partition("#")
    try:
        uri = _uri(place)
        client = MlflowClient(tracking_uri=uri)
        experiment_id = _experiment(client, uri, experiment or EXPERIMENT)
        identity = _identity(manifest)
        known = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{identity}'", max_results=1)
        if known:
            return f"MLflow run {known[0].info.run_id} at {uri} (it was there already)"
        return f"MLflow run {_record(client, experiment_id, identity, name, folder, manifest)} at {uri}"
    except (MlflowException, OSError) as e:
        raise EnvironmentFailed(
            f"MLflow refused: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
            where=f"mlflow:{address}",
            remedy="check the address; the run itself is complete, log it with `rescompress report DIR --track ...`",
        ) from e


def _uri(place: str) -> str:
    """Return the tracking URI: the place itself, or the SQLite store in a folder."""
    if "://" in place or place.startswith(("sqlite:", "file:")):
        return place
    folder = Path(place).resolve()
    if any(folder.glob("*/meta.yaml")):
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of the experiment, made if need be; a local database keeps its artifacts beside it."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    beside = None
    if uri.startswith("sqlite:///"):
        beside = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=beside))


def _identity(manifest: Manifest) -> str:
    """Return a hash of what the run is: its stages' keys and when it was made."""
    parts = [manifest.created, *(f"{s.stage} {s.key} {s.status}" for s in manifest.stages)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _record(client: Any, experiment: str, identity: str, name: str, folder: Path, manifest: Manifest) -> str:
    from mlflow.entities import Metric, Param, RunTag

    time = _milliseconds(manifest.created)
    run_id = str(client.create_run(experiment, start_time=time, run_name=name).info.run_id)
    params = [Param(key, text[:LONGEST_TEXT]) for key, text in settings(manifest.config)]
    metrics = [Metric(_legal(tag), value, time, 0) for tag, value in figures(manifest)]
    metrics += [Metric(_legal(tag), value, time + 1000 * epoch, epoch) for tag, epoch, value in curves(manifest)]
    tags = [RunTag("rescompress.version", manifest.rescompress_version)]
    tags += [RunTag(f"environment.{key}", text[:LONGEST_TEXT]) for key, text in settings(manifest.environment)]
    for stage in manifest.stages:
        latency = stage.metrics.get("p50_ms")
        if latency is not None:
            tags.append(RunTag(f"latency.{_legal(stage.stage)}", provenance(latency)[:LONGEST_TEXT]))
        if stage.status != "done":
            tags.append(RunTag(f"stage.{_legal(stage.stage)}", f"{stage.status}: {stage.reason}"[:LONGEST_TEXT]))
    for part in _batches(params):
        client.log_batch(run_id, params=part)
    for part in _batches(metrics):
        client.log_batch(run_id, metrics=part)
    for part in _batches(tags):
        client.log_batch(run_id, tags=part)
    client.log_artifact(run_id, str(folder / MANIFEST_NAME))
    for stage in manifest.stages:
        for artifact in stage.outputs:
            path = folder / artifact.path
            if path.is_file():
                below = Path(artifact.path).parent.as_posix()
                client.log_artifact(run_id, str(path), None if below == "." else below)
    failed = any(s.status == "failed" for s in manifest.stages)
    # The tag comes last: a recording that broke off is not taken for a whole one.
    client.set_tag(run_id, RUN_TAG, identity)
    client.set_terminated(run_id, status="FAILED" if failed else "FINISHED")
    return run_id


def _milliseconds(created: str) -> int:
    try:
        return int(1000 * datetime.datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0


def _legal(name: str) -> str:
    """Return a name of letters, digits, ``_-./`` and spaces, as MLflow wants it."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in name)


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
