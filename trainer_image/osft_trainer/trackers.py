"""Services that show the metrics of runs: Weights & Biases, MLflow, TensorBoard.

Each is an optional package, asked for by a parameter. Called by `train` on the first rank alone;
the rows come from `tracking`. Must never: import a package that was not asked for, or read a key
from anywhere but the environment.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from osft_trainer.config import TrainingParameters

logger = logging.getLogger(__name__)

Row = Mapping[str, float | int | str]

_RUN_TAG = "osft.run_id"
"""Tag of an MLflow run by which a later attempt finds it."""


class Service(Protocol):
    """Takes the rows of one run."""

    def log(self, row: Row) -> None:
        """One step's numbers."""

    def close(self, failed: bool) -> None:
        """The run has ended."""


def start_services(
    training: TrainingParameters, run_id: str, folder: Path, logs: Path, done_steps: int
) -> list[Service]:
    """Start what is asked for; a later attempt of a run continues what is there.

    Args:
        training: what is asked for.
        run_id: identity of the run, the same in every attempt.
        folder: where Weights & Biases keeps its own files.
        logs: where TensorBoard's events go.
        done_steps: steps that the services may know already; what they know beyond is void.

    Raises:
        ValueError: a package is not installed, has no key, or does not know the address.
        OSError: a server cannot be reached, or refuses.
    """
    found: list[Service] = []
    if training.wandb_project is not None:
        found.append(_WeightsAndBiases(training, run_id, folder))
    if training.mlflow_tracking_uri is not None:
        found.append(_MLflow(training, run_id))
    if training.tensorboard:
        found.append(_TensorBoard(logs, done_steps))
    return found


def _package(name: str, module: str, parameter: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{parameter} needs the package {name}: pip install 'osft[{extra}]'"
        ) from error


class _WeightsAndBiases:
    def __init__(self, training: TrainingParameters, run_id: str, folder: Path) -> None:
        parameter = f"wandb_project {training.wandb_project!r}"
        wandb = _package("wandb", "wandb", parameter, "wandb")
        try:
            self._run = wandb.init(
                project=training.wandb_project,
                entity=training.wandb_entity,
                name=training.wandb_run_name,
                id=re.sub(r"[/\\#?%:]", "-", run_id),  # these it refuses
                resume="allow",
                dir=str(folder),
                config=training.model_dump(mode="json"),
            )
        except wandb.errors.UsageError as error:
            raise ValueError(
                f"{parameter}: {error}; set WANDB_API_KEY, or WANDB_MODE=offline"
            ) from error
        except wandb.errors.CommError as error:
            raise OSError(
                f"{parameter}: {error}; check WANDB_API_KEY, WANDB_BASE_URL and the network, or "
                "set WANDB_MODE=offline"
            ) from error

    def log(self, row: Row) -> None:
        self._run.log(dict(row), step=row["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class _MLflow:
    def __init__(self, training: TrainingParameters, run_id: str) -> None:
        uri = str(training.mlflow_tracking_uri)
        parameter = f"mlflow_tracking_uri {uri!r}"
        mlflow = _package("mlflow", "mlflow", parameter, "mlflow")
        if uri.startswith("file:"):
            # Newer ones take a store of files only from who asks twice; our user has named it.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._run = self._found_or_made(training, run_id)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE" and not uri.startswith("http"):
                raise ValueError(
                    f"{parameter}: {error}; databases need the whole package: pip install mlflow"
                ) from error
            raise OSError(
                f"{parameter}: {error}; check the address and MLFLOW_TRACKING_*"
            ) from error

    def _found_or_made(self, training: TrainingParameters, run_id: str) -> str:
        name = training.mlflow_experiment_name or "Default"
        experiment = self._client.get_experiment_by_name(name)
        number = (
            self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        )
        for run in self._client.search_runs([number], f"tags.`{_RUN_TAG}` = '{run_id}'"):
            self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        made = self._client.create_run(
            number, tags={_RUN_TAG: run_id}, run_name=training.mlflow_run_name
        )
        for key, value in training.model_dump(mode="json", exclude_none=True).items():
            self._client.log_param(made.info.run_id, key, value)
        return str(made.info.run_id)

    def log(self, row: Row) -> None:
        step = int(row["step"])
        for name, number in _numbers(row):
            # Sent by a thread of its own: a slow server must not slow the steps.
            self._client.log_metric(self._run, name, number, step=step, synchronous=False)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class _TensorBoard:
    def __init__(self, logs: Path, done_steps: int) -> None:
        # torch only wraps the package; without it this import fails.
        module = _package("tensorboard", "torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(logs), purge_step=done_steps + 1)

    def log(self, row: Row) -> None:
        for name, number in _numbers(row):
            self._writer.add_scalar(name, number, int(row["step"]))

    def close(self, failed: bool) -> None:
        self._writer.close()


def _numbers(row: Row) -> list[tuple[str, float]]:
    return [
        (name, float(value))
        for name, value in row.items()
        if name != "step" and not isinstance(value, str)
    ]
