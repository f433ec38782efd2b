"""Methods on Flax NNX models: `attach` puts a trainable adapter into a copy of a model.

The functional form needs nothing of this module: ``method.bind(model, *inputs)``.
"""

from jpeft.nnx.attach import attach as attach
from jpeft.nnx.peft import NnxPeft as NnxPeft
from jpeft.nnx.variables import AdapterParam as AdapterParam
from jpeft.nnx.variables import FrozenAdapterParam as FrozenAdapterParam
