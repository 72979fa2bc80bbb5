"""Calibration with the real traffic: collect importance while requests are answered, and pack the weights with it.

POST /calibration/start      watch the inputs of all layers from now on
GET  /calibration/status     what has been collected, and whether there is something to roll back
POST /calibration/stop       drop what was collected
POST /calibration/apply      {"isq": FORMAT, "source": "stored", "save": NAME}, each optional: end the collection and pack
                             the weights with it; with a name also write the model and its importance matrix
POST /calibration/rollback   the weights from before the last apply, from the source again
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from isqtorch.app.model import State
from isqtorch.files.writing import replacing_folder
from isqtorch.importance.calibration import calibrate
from isqtorch.inplace.weights import STORED
from isqtorch.report.report import QuantReport

from .body import Body, shown
from .other_requests import checked_format, known_fields
from .served import ApiError, Served

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_IMATRIX = "imatrix.gguf"


class Live:
    """The calibration of a served model.

    Args:
        served: the model.
        folder: where `apply` may write models; None: nowhere.
    """

    def __init__(self, served: Served, folder: Path | None) -> None:
        self._served, self._folder = served, folder
        self._watching: ExitStack | None = None
        self._imatrix: Any = None
        self._before: State | None = None
        served.busy = self._why_busy

    def status(self) -> dict[str, Any]:
        """What /calibration/status answers."""
        return {
            "collecting": self._watching is not None,
            "tokens": 0 if self._imatrix is None else self._imatrix.tokens,
            "isq": self._served.loaded.isq,
            "can_roll_back": self._before is not None,
            "can_save": self._folder is not None,
        }

    async def start(self) -> dict[str, Any]:
        """Watch the layers, from the next step on.

        Raises:
            ApiError: 409 if they are watched already, or the format is being changed.
        """
        self._check(collecting=False)
        await self._between(self._start)
        return self.status()

    async def stop(self) -> dict[str, Any]:
        """Drop what was collected.

        Raises:
            ApiError: 409 if nothing is collected.
        """
        self._check(collecting=True)
        await self._between(self._stop)
        self._imatrix = None
        return self.status()

    async def apply(self, isq: str | None, source: str | None, name: str | None) -> QuantReport:
        """Pack the weights with what was collected, after the requests before this one.

        Args:
            isq: the format; None: the present one.
            source: "stored" or None, as for /re_isq.
            name: write the model and its importance matrix into a new folder of this name; None: do not.

        Raises:
            ApiError: 400 if there is no format or no place to write, 409 if nothing is collected. The model is
                unchanged.
        """
        self._check(collecting=True)
        wanted = isq or self._served.loaded.isq
        if wanted is None:
            raise ApiError(400, 'the model was loaded as it is; say which format: {"isq": FORMAT}')
        target = None if name is None else self._target(name)
        if not self._imatrix.tokens:
            raise ApiError(409, "no request was answered since /calibration/start: there is nothing to apply")
        report: QuantReport = await self._served.change(wanted, lambda: self._apply(wanted, source, target))
        return report

    async def rollback(self) -> dict[str, Any]:
        """Make the weights again that the model had before the last apply.

        Raises:
            ApiError: 409 if there was no apply, or importance is being collected.
        """
        self._check(collecting=False)
        before = self._before
        if before is None:
            raise ApiError(409, "there is nothing to roll back: /calibration/apply was not called")
        await self._served.change(before.isq, lambda: self._served.loaded.restore(before))
        self._before = None
        return self.status()

    # ---- on the generating thread ------------------------------------------------------------------------------------

    def _start(self) -> None:
        with ExitStack() as stack:
            self._imatrix = stack.enter_context(calibrate(self._served.loaded.model))
            self._watching = stack.pop_all()

    def _stop(self) -> None:
        assert self._watching is not None
        watching, self._watching = self._watching, None
        try:
            watching.close()
        except ValueError:  # nothing ran, or a layer's inputs overflowed: `refresh` says so if the matrix is wanted
            pass

    def _apply(self, isq: str, source: str | None, target: Path | None) -> QuantReport:
        loaded, imatrix = self._served.loaded, self._imatrix
        imatrix.refresh()  # raises before anything is changed
        self._stop()
        self._imatrix = None
        before = loaded.state()
        loaded.options["imatrix"] = imatrix
        try:
            report = loaded.requantize(isq, source)
        except BaseException:
            loaded.options["imatrix"] = before.imatrix
            raise
        self._before = before
        if target is not None:
            with replacing_folder(target, lambda path: False) as folder:
                loaded.save(folder)
                imatrix.save(folder / _IMATRIX)
        return report

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _check(self, *, collecting: bool) -> None:
        if self._served.requantizing:
            raise ApiError(409, "the model is changing its format; ask again when that is done")
        if collecting and self._watching is None:
            raise ApiError(409, "nothing is being collected; /calibration/start begins")
        if not collecting and self._watching is not None:
            raise ApiError(409, "importance is being collected; /calibration/apply or /calibration/stop ends that")

    def _why_busy(self) -> str | None:
        """Why the format must not be changed by another way now."""
        if self._watching is None:
            return None
        return "importance is being collected for the present layers; /calibration/apply or /calibration/stop ends that"

    def _target(self, name: str) -> Path:
        if self._folder is None:
            raise ApiError(400, "this server writes no models: it was started without --save-dir")
        target = self._folder / name
        if target.exists() or target.is_symlink():
            raise ApiError(409, f"{name!r} exists already; choose another name")
        return target

    async def _between(self, call: Callable[[], None]) -> None:
        try:
            await asyncio.wrap_future(self._served.generations.scheduler.between(call))
        except ValueError as error:
            raise ApiError(409, str(error)) from None


def check_nothing(body: Body) -> None:
    """Check the body of an endpoint that takes no fields."""
    known_fields(body, set(), "it")


def check_apply(body: Body) -> tuple[str | None, str | None, str | None]:
    """(format, source, name) in a body of /calibration/apply. Clients may not name paths."""
    known_fields(body, {"isq", "source", "save"}, "/calibration/apply")
    isq, source, name = body.get("isq"), body.get("source"), body.get("save")
    if source not in (None, STORED):
        raise ValueError(f'source can only be "{STORED}"; leave it out to read the checkpoint again')
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"save must be a name of up to 64 letters, digits, dots, dashes and underscores, got {shown(name)}"
        )
    return None if isq is None else checked_format(isq), source, name
