"""A run's Weights & Biases run: one for all its starts, with steps that never go back."""

import re
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.files import write_file
from pretrain.config import RunConfig

ID = "wandb_id"  # file of a run's folder


class WandbRun:
    """Logs to the W&B run whose id is in the run's folder; the first start draws it.

    W&B ignores steps below its last one. What a resumed run repeats is what it has logged already, and is not
    sent again.

    Args:
        start_step: optimizer steps done.
        logged: last step that earlier starts have written to metrics.jsonl.
        warn: takes a line. If wandb's own process ends, that is such a line, and training continues.

    Raises:
        ValueError: wandb is not installed, or cannot be started with these settings.
        OSError: the id cannot be stored.
    """

    def __init__(
        self, config: RunConfig, run: Path, start_step: int, logged: int, warn: Callable[[str], None]
    ) -> None:
        settings, self.warn = config.wandb, warn
        try:
            import wandb  # takes seconds, and most runs do not use it
        except ImportError:
            raise ValueError(
                f"wandb.mode={settings.mode} needs wandb, which is not installed: pip install wandb, or set "
                "wandb.mode=disabled"
            ) from None
        mode: Any = settings.mode
        self.failures = (wandb.Error, OSError)
        try:
            self.run: Any = wandb.init(
                project=settings.project,
                mode=mode,
                dir=run,
                name=run.name,
                id=_stored_id(run / ID),
                resume="allow",
                config=asdict(config),
                allow_val_change=True,  # of the config, when a run resumes with another one
            )
        except (wandb.Error, TypeError, ValueError) as error:
            raise ValueError(
                f"wandb.project={settings.project!r}, wandb.mode={settings.mode} cannot be started: "
                f"{str(error).splitlines()[0]}; correct them, log in (`wandb login`), or set "
                "wandb.mode=disabled"
            ) from error
        # Offline, wandb does not know what an earlier start has logged.
        self.last = max(start_step, self.run.step - 1, logged if settings.mode == "offline" else 0)
        self._row = self.last + 1
        if self.last > start_step:
            warn(f"wandb has the steps up to {self.last} already; they are not sent again")

    def log(self, step: int | None, values: dict[str, Any]) -> None:
        """Sends values of an optimizer step, or (None) beside those of the newest."""
        if step is not None:
            if step <= self.last:
                return
            self.last = self._row = step
        self._try(lambda: self.run.log(values, step=self._row))

    def finish(self) -> None:
        self._try(lambda: self.run.finish())

    def _try(self, call: Callable[[], Any]) -> None:
        if self.run is None:
            return
        try:
            call()
        except self.failures as error:
            self.run = None
            self.warn(f"warning: wandb has failed ({error}); this start sends it nothing more")


def _stored_id(path: Path) -> str:
    known = path.read_text(errors="replace").strip() if path.exists() else ""
    if re.fullmatch(r"[a-z0-9]{8,64}", known):
        return known
    new = secrets.token_hex(4)
    write_file(path, f"{new}\n".encode())
    return new
