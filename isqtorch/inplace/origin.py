"""Origin: the checkpoint and the request that a quantized model was made from. `requantize_` starts from them.

It is an attribute of the model, so copy and pickle keep it. It is not part of the state dict and of saved checkpoints.
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
    """Where the weights of a model came from, and which layers the last request selected.

    Attributes:
        files: the files of the checkpoint; empty if not known.
        trouble: reason why the checkpoint does not have the weights that were quantized, or None.
        options: the options of the request that `requantize_` keeps; see `Options.lasting`.
    """

    files: tuple[str, ...] = ()
    trouble: str | None = None
    options: Options = field(default_factory=Options)

    @classmethod
    def made(cls, files: Sequence[str], trouble: str | None, request: Request) -> Origin:
        return cls(tuple(files), trouble, request.options.lasting())

    @classmethod
    def before(cls, model: nn.Module, request: Request) -> Origin:
        """The origin of a model before its float weights are packed.

        The weights are compared with the checkpoint now: after packing it is impossible.
        """
        files = files_of(model)
        try:
            changed = difference(model, open_source(model, files)) if files else None
            trouble = (
                None if changed is None else f"{changed} was not what the checkpoint has when the model was quantized"
            )
        except Exception as error:  # of any kind, for quantize_ itself does not need the checkpoint
            trouble = f"the checkpoint could not be read when the model was quantized ({error})"
        return cls.made(files, trouble, request)

    @classmethod
    def of(cls, model: nn.Module) -> Origin | None:
        """The origin of a model, or None if it has none."""
        found = vars(model).get(_ATTRIBUTE)
        return found if isinstance(found, Origin) else None

    def attach(self, model: nn.Module) -> None:
        vars(model)[_ATTRIBUTE] = self


def forget(model: nn.Module) -> None:
    """Remove the origin, after the packed layers are gone."""
    vars(model).pop(_ATTRIBUTE, None)
