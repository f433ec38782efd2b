"""Geometries: how a module uses its weight, as a plain matrix problem.

A geometry views the weight as ``[batch..., in, out]``, the module's input as ``[batch..., tokens..., in]`` and its
output as ``[batch..., tokens..., out]``, so that a method is written once, for one matrix. Everything linear that an
einsum can say is a `Contraction`; a convolution is a `Convolution`; an embedding is an `Embedding`; a parameter that
no module call explains is `Raw`. `register_geometry` adds one from outside.
"""

from jpeft.geometry import base as base
from jpeft.geometry.base import Call as Call
from jpeft.geometry.base import Geometry as Geometry
from jpeft.geometry.base import Parts as Parts
from jpeft.geometry.base import Raw as Raw
from jpeft.geometry.contraction import Contraction as Contraction
from jpeft.geometry.convolution import Convolution as Convolution
from jpeft.geometry.convolution import Patches as Patches
from jpeft.geometry.embedding import Embedding as Embedding
from jpeft.geometry.embedding import Lookup as Lookup
from jpeft.geometry.embedding import attend as attend
from jpeft.geometry.registry import REGISTRY as REGISTRY
from jpeft.geometry.registry import by_position as by_position
from jpeft.geometry.registry import find as find
from jpeft.geometry.registry import owner_of as owner_of
from jpeft.geometry.registry import register_geometry as register_geometry
from jpeft.geometry.registry import signature_of as signature_of
