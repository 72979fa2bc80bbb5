"""What a quantized model was made from and by which request: `requantize_` starts again from there.

Kept on the model, so that it goes where the model goes, also through copy and pickle; never saved with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from isqtorch.formats import Spec
from isqtorch.policy.decide import Request
from isqtorch.policy.topology import Topology, TopologyLike

from .source import difference, files_of, open_source

_ATTRIBUTE = "_isq_origin"


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model came from, and the options of the request that was carried out last.

    Attributes:
        files: the checkpoint; empty if it is not known.
        trouble: why the checkpoint does not stand for the weights that were quantized; None: it does.
    """

    files: tuple[str, ...] = ()
    trouble: str | None = None
    topology: Topology = field(default_factory=lambda: Topology(()))
    organization: str = "default"
    include: Sequence[str] | str | None = None
    exclude: Sequence[str] | str | None = None
    fallback: str = "up"

    @classmethod
    def made(cls, files: Sequence[str], trouble: str | None, request: Request) -> Origin:
        return cls(
            tuple(files),
            trouble,
            request.entries,
            request.organization,
            request.include,
            request.exclude,
            request.fallback,
        )

    @classmethod
    def before(cls, model: nn.Module, request: Request) -> Origin:
        """For a model whose float weights are about to be packed: afterwards nobody can tell whether they are the checkpoint's."""
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

    def request(
        self,
        fmt: Spec | None,
        topology: TopologyLike | None,
        organization: str | None,
        include: Sequence[str] | str | None,
        exclude: Sequence[str] | str | None,
        fallback: str | None,
        activations: str | None,
    ) -> Request:
        """A new request; what it leaves open is as before (but for `activations`, which the layers know).

        Raises:
            ValueError: see `Request`, and where a new topology places layers on devices.
        """
        if topology is not None:
            for entry in Topology.load(topology).entries:
                if entry.device is not None:
                    raise ValueError(
                        f"requantize_: topology entry {entry.key!r} names a device, and requantize_ moves no layer. Leave it out, and "
                        "use .to() on the layer."
                    )
        return Request(
            fmt,
            self.topology if topology is None else topology,
            self.organization if organization is None else organization,
            self.include if include is None else include,
            self.exclude if exclude is None else exclude,
            self.fallback if fallback is None else fallback,
            "requantize_",
            activations=activations,
        )


def forget(model: nn.Module) -> None:
    """After the packed layers are gone."""
    vars(model).pop(_ATTRIBUTE, None)
