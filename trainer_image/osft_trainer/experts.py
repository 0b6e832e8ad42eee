"""Parameters that a model's own code reads, replaced by computed ones.

What lives here: a small re-parameterisation of one attribute of one module, and the float32
master of a parameter that is used in a lower precision. Expert tensors (3-D parameters read by the
experts' own forward) get their effective weight this way; so do trained norms, embeddings and
biases on CUDA.
Called by `model.convert`. Must never: choose what is replaced.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

TRAINED_SUFFIX = "_trained"
"""Child module that computes attribute `x` is registered as `x_trained`."""


class ComputesWeight(Protocol):
    """What may stand behind an attribute: `SubspaceWeight` or `MasterParameter`."""

    def weight(self) -> Tensor:
        """The tensor that the model's code uses."""


class MasterParameter(nn.Module):
    """A trained float32 parameter that the model sees in its compute dtype."""

    def __init__(self, value: Tensor, compute_dtype: torch.dtype) -> None:
        """`value` is copied to float32."""
        super().__init__()
        self.value = nn.Parameter(value.detach().to(torch.float32))
        self.compute_dtype = compute_dtype

    def weight(self) -> Tensor:
        """The value in the compute dtype; the gradient arrives in float32."""
        return self.value.to(self.compute_dtype)


def replace_parameter(owner: nn.Module, name: str, source: nn.Module) -> None:
    """Let `owner.<name>` be `source.weight()`, evaluated at every access.

    The owner gets a subclass of its own class with a property, as `torch.nn.utils.parametrize`
    does, so that the forward of a library reads the computed tensor without knowing.
    """
    assert name in owner._parameters, f"{type(owner).__name__} has no parameter {name}"
    child = name + TRAINED_SUFFIX

    def read(module: nn.Module) -> Tensor:
        return cast(ComputesWeight, module._modules[child]).weight()

    del owner._parameters[name]
    owner.add_module(child, source)
    kind = type(owner)
    owner.__class__ = type(kind.__name__, (kind,), {name: property(read)})
