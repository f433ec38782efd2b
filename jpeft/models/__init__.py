"""Linen models that read and write HuggingFace folders, and read GGUF files."""

from jpeft.core.stacking import stack as stack
from jpeft.core.stacking import unroll as unroll
from jpeft.core.stacking import unstack as unstack
from jpeft.errors import ModelError as ModelError
from jpeft.models.decoder import Decoder as Decoder
from jpeft.models.decoder import init_cache as init_cache
from jpeft.models.loading import FAMILIES as FAMILIES
from jpeft.models.loading import abstract as abstract
from jpeft.models.loading import is_decoder as is_decoder
from jpeft.models.loading import load as load
from jpeft.models.loading import logical_names as logical_names
from jpeft.models.loading import logical_shardings as logical_shardings
from jpeft.models.loading import save as save
