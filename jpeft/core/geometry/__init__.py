"""Geometries: how a module uses its weight, as a plain matrix problem.

A geometry views the weight as ``[batch..., in, out]``, the module's input as ``[batch..., tokens..., in]`` and its
output as ``[batch..., tokens..., out]``, so that a method is written once, for one matrix. Everything linear that an
einsum can say is a `Contraction`; a convolution is a `Convolution`; an embedding is an `Embedding`; a parameter that
no module call explains is `Raw`. `register_geometry` adds one from outside.
"""

from jpeft.core.geometry import base as base
from jpeft.core.geometry.base import Call as Call
from jpeft.core.geometry.base import Geometry as Geometry
from jpeft.core.geometry.base import Parts as Parts
from jpeft.core.geometry.base import Raw as Raw
from jpeft.core.geometry.contraction import Contraction as Contraction
from jpeft.core.geometry.convolution import Convolution as Convolution
from jpeft.core.geometry.convolution import Patches as Patches
from jpeft.core.geometry.embedding import Embedding as Embedding
from jpeft.core.geometry.embedding import Lookup as Lookup
from jpeft.core.geometry.embedding import attend as attend
from jpeft.linen.registry import REGISTRY as REGISTRY
from jpeft.linen.registry import by_position as by_position
from jpeft.linen.registry import find as find
from jpeft.linen.registry import owner_of as owner_of
from jpeft.linen.registry import register_geometry as register_geometry
from jpeft.linen.registry import signature_of as signature_of
