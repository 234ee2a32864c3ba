"""Loggers that continue in a resumed run: a CSV file, TensorBoard, and Weights and Biases."""

from __future__ import annotations

import csv
import logging
import os
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)

LONGEST_WAIT = 5.0  # seconds; a file that is dated further ahead has a wrong clock
EVENT_FILE = "events.out.tfevents."  # followed by second of creation, host, process and number


class MetricsCSV(Logger):
    """Lightning logger that writes `<save_dir>/metrics.csv`, with a row per logged step.

    A run that resumes in the same folder continues the file. It first removes the rows of the
    interrupted run from its own first logged step on, so every step has one row.

    Args:
        save_dir: Folder of the run.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = os.path.expanduser(save_dir)
        self._columns: list[str] = []
        self._started = False

    @property
    def name(self) -> str:
        """The logger's name. It is constant, because each run has a folder of its own."""
        return "csv"

    @property
    def version(self) -> str:
        """The logger's version. It is empty, because each run has a folder of its own."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return self._save_dir

    @property
    def path(self) -> Path:
        """Path of the CSV file."""
        return Path(self._save_dir) / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Writes the options to `<save_dir>/hparams.yaml`.

        Args:
            params: A dictionary, nested as the options are, or a Namespace.
            args: Not used.
            kwargs: Not used.
        """
        plain = vars(params) if isinstance(params, Namespace) else dict(params or {})
        if plain:
            Path(self._save_dir).mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(plain, sort_keys=False)
            (Path(self._save_dir) / "hparams.yaml").write_text(text)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row to the file.

        Args:
            metrics: Values by name: numbers or 0-dim tensors.
            step: Optimizer step, counted from 0.
        """
        row: dict[str, Any] = {"step": step}
        row.update({key: float(value) for key, value in metrics.items()})
        earlier: list[dict[str, Any]] = []
        if not self._started:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            earlier = [old for old in _read_rows(self.path) if int(old["step"]) < (step or 0)]
        elif not row.keys() <= set(self._columns):
            earlier = _read_rows(self.path)
        if earlier or not self._started or not row.keys() <= set(self._columns):
            names = {key for old in [*earlier, row] for key in old}
            self._columns = ["step", *sorted(names - {"step"})]
            self._rewrite(earlier)
        self._started = True
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file atomically by a header and the given rows."""
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def wandb_logger(
    save_dir: str,
    project: str = "lctrain",
    name: str | None = None,
    offline: bool = True,
    id: str | None = None,
) -> Logger:
    """Builds Lightning's WandbLogger. Offline, it needs neither a key nor a network.

    Args:
        save_dir: Folder of the logger's files.
        project: Name of the project in Weights and Biases.
        name: Name of the run in Weights and Biases.
        offline: Whether to keep all metrics on this machine; `wandb sync` uploads them later.
        id: Id of the run in Weights and Biases. A resumed run with the same id continues it.
    """
    save_dir = os.path.expanduser(save_dir)
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    return WandbLogger(save_dir=save_dir, project=project, name=name, offline=offline, id=id)


class TensorBoardRun(TensorBoardLogger):
    """Lightning's TensorBoardLogger, with one curve for an interrupted and resumed run.

    A resumed run logs again the steps after its checkpoint, which the interrupted run has logged.
    Its first event tells TensorBoard to discard earlier events from that step on.

    TensorBoard reads the event files of a folder in the order of their names, which start with the
    second of creation. Two files of the same second have no reliable order. So each TensorBoardRun
    opens one file only, in a later second than those of the existing files.
    """

    _experiment: Any  # the SummaryWriter, or None before the file is opened

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The SummaryWriter. The first access opens its event file, within about a second."""
        if self._experiment is None:
            _wait_until_names_sort_last(Path(self.log_dir))
        return super().experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes all points to disk. The event file stays open for the next fit or validation.

        Args:
            status: "success", or how the fit or validation failed.
        """
        if self._experiment is not None:
            self._experiment.flush()
        if status == "success":
            self.save()

    @rank_zero_only
    def close(self) -> None:
        """Closes the event file. A point that is logged later opens another one."""
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds one point to the curve of every metric.

        Args:
            metrics: Values by name: numbers or 0-dim tensors.
            step: Optimizer step, counted from 0.
        """
        if not getattr(self, "_started", False):
            self._started = True
            self._forget_from(step or 0)
        super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Logs the options as text, and writes them to `hparams.yaml` in the logger's folder.

        Args:
            params: A dictionary, nested as the options are, or a Namespace.
            args: Not used.
            kwargs: Not used.
        """
        plain = vars(params) if isinstance(params, Namespace) else dict(params or {})
        if not plain:
            return
        self.hparams.update(plain)
        text = yaml.safe_dump(dict(self.hparams), sort_keys=False)
        self.experiment.add_text("options", f"```yaml\n{text}```", 0)
        (Path(self.log_dir) / self.NAME_HPARAMS_FILE).write_text(text)

    def _forget_from(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        writer = self.experiment._get_file_writer()  # as SummaryWriter does for its purge_step
        writer.add_event(start)


def tensorboard_logger(save_dir: str) -> Logger:
    """Builds Lightning's TensorBoardLogger. A resumed run continues in the same folder.

    Args:
        save_dir: Parent folder of the folder `tensorboard`.

    Raises:
        ValueError: if TensorBoard is not installed.
    """
    try:
        return TensorBoardRun(
            save_dir=save_dir, name="tensorboard", version="", default_hp_metric=False
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            "logger=tensorboard needs the package tensorboard, got none. Install "
            "lctrain[tensorboard], or choose logger=csv."
        ) from error


def with_run_id(configs: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    """Returns the settings of the loggers, with the run's id where a logger's `id` is None.

    Args:
        configs: Settings of the loggers by name, as in `TrainConfig.logger`.
        run_id: Id of the run.
    """
    return {
        name: replace(config, id=run_id) if getattr(config, "id", run_id) is None else config
        for name, config in configs.items()
    }


@contextmanager
def closing(loggers: Sequence[Any]) -> Iterator[None]:
    """Context manager that ends the runs of loggers, also after an error.

    Otherwise the next job of a --multirun, in the same process, would continue this run.

    Args:
        loggers: Loggers of the run. Only a WandbLogger and a TensorBoardRun are affected.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in loggers:
            if isinstance(logger, TensorBoardRun):
                logger.close()
        if any(isinstance(logger, WandbLogger) for logger in loggers):
            import wandb

            wandb.finish(exit_code=int(failed))


def log_evaluation(
    logger: Logger,
    rows: list[dict[str, Any]],
    plot: Path | None,
    name: str = "perplexity_by_length",
) -> None:
    """Sends the table of an evaluation and its plot to a logger that can show them.

    Args:
        logger: A Lightning logger; without `log_table` and `log_image` nothing is logged.
        rows: Rows of the table, with the same keys.
        plot: PNG file of the plot; None logs no plot.
        name: Name of the table; the plot's ends in `_plot`.
    """
    if rows and hasattr(logger, "log_table"):
        columns = list(rows[0])
        logger.log_table(name, columns=columns, data=[list(row.values()) for row in rows])
    if plot is not None and hasattr(logger, "log_image"):
        logger.log_image(f"{name}_plot", images=[str(plot)])


def log_picture(logger: Any, name: str, picture: Path, step: int) -> None:
    """Shows a PNG file in TensorBoard; other loggers are left alone.

    Args:
        logger: A Lightning logger.
        name: Name of the picture.
        picture: The file.
        step: Optimizer step, counted from 0.
    """
    add = getattr(getattr(logger, "experiment", None), "add_image", None)
    if add is not None:
        from matplotlib.image import imread

        add(name, imread(picture), step, dataformats="HWC")


def _wait_until_names_sort_last(folder: Path) -> None:
    """Waits for the second after that of the newest event file in the folder."""
    seconds = [path.name.removeprefix(EVENT_FILE) for path in folder.glob(f"{EVENT_FILE}*")]
    newest = max(
        (int(text) for name in seconds if (text := name.split(".")[0]).isdigit()), default=0
    )
    ahead = newest + 1 - time.time()
    if ahead > LONGEST_WAIT:
        log.warning(
            "The event files in %s are %.0f s ahead of this machine's clock, so TensorBoard may "
            "show steps twice or not at all. Set the clock.",
            folder,
            ahead,
        )
        return
    while time.time() < newest + 1:
        time.sleep(0.02)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the complete rows of a CSV file, without damaged rows and a last row cut short."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    return [row for row in rows if None not in row.values() and str(row.get("step", "")).isdigit()]
