"""Geometries: how a module uses its weight, as a matrix product.

A geometry views the weight as ``[batch..., in, out]``, the module's input as ``[batch..., tokens..., in]`` and its
output as ``[batch..., tokens..., out]``, so that a method is written once, for one matrix. A weight used in an einsum
is a `Contraction`, a convolution kernel a `Convolution`, an embedding table an `Embedding`, a parameter that a trace
shows to reach a product is `Traced` or, if it is looked up, a `TracedTable`, and any other parameter is `Raw`.
`jpeft.register_geometry` adds a geometry for other modules. A call's geometry is believed only if it explains what the
trace of the call shows.
"""

from jpeft.core.geometry.base import Call as Call
from jpeft.core.geometry.base import Geometry as Geometry
from jpeft.core.geometry.base import Parts as Parts
from jpeft.core.geometry.base import Raw as Raw
from jpeft.core.geometry.contraction import Contraction as Contraction
from jpeft.core.geometry.convolution import Convolution as Convolution
from jpeft.core.geometry.convolution import Patches as Patches
from jpeft.core.geometry.embedding import Embedding as Embedding
from jpeft.core.geometry.embedding import Lookup as Lookup
from jpeft.core.geometry.embedding import TracedTable as TracedTable
from jpeft.core.geometry.embedding import attend as attend
from jpeft.core.geometry.traced import Traced as Traced
