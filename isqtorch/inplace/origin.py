"""What a quantized model was made from and by which request: `requantize_` starts again from there.

Kept on the model, so that it goes where the model goes, also through copy and pickle; never saved with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

from .host import files_of, open_source
from .source import difference

_ATTRIBUTE = "_isq_origin"


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model came from, and which layers the last request meant.

    Attributes:
        files: the checkpoint; empty if it is not known.
        trouble: why the checkpoint does not stand for the weights that were quantized; None: it does.
        options: what lasts of the request, see `Options.lasting`.
    """

    files: tuple[str, ...] = ()
    trouble: str | None = None
    options: Options = field(default_factory=Options)

    @classmethod
    def made(cls, files: Sequence[str], trouble: str | None, request: Request) -> Origin:
        return cls(tuple(files), trouble, request.options.lasting())

    @classmethod
    def before(cls, model: nn.Module, request: Request) -> Origin:
        """For a model whose float weights are about to be packed. They are compared with the checkpoint now: after packing
        it is impossible."""
        files = files_of(model)
        try:
            changed = difference(model, open_source(model, files)) if files else None
            trouble = (
                None if changed is None else f"{changed} was not what the checkpoint has when the model was quantized"
            )
        except Exception as error:  # also of a loader's conversions: quantize_ does not need the checkpoint
            trouble = f"the checkpoint could not be read when the model was quantized ({error})"
        return cls.made(files, trouble, request)

    @classmethod
    def of(cls, model: nn.Module) -> Origin | None:
        """What is known of a model, None if nothing is."""
        found = vars(model).get(_ATTRIBUTE)
        return found if isinstance(found, Origin) else None

    def attach(self, model: nn.Module) -> None:
        vars(model)[_ATTRIBUTE] = self


def forget(model: nn.Module) -> None:
    """After the packed layers are gone."""
    vars(model).pop(_ATTRIBUTE, None)
