"""Linen models that load and save HuggingFace folders and load GGUF files."""

from jpeft.core.stacking import stack as stack
from jpeft.core.stacking import unroll as unroll
from jpeft.core.stacking import unstack as unstack
from jpeft.errors import ModelError as ModelError
from jpeft.models.axes import logical_names as logical_names
from jpeft.models.axes import logical_shardings as logical_shardings
from jpeft.models.decoder import Decoder as Decoder
from jpeft.models.families import FAMILIES as FAMILIES
from jpeft.models.families import is_decoder as is_decoder
from jpeft.models.kv_cache import init_cache as init_cache
from jpeft.models.loading import abstract as abstract
from jpeft.models.loading import load as load
from jpeft.models.saving import save as save
from jpeft.models.vocabulary import resize_embeddings as resize_embeddings
from jpeft.models.vocabulary import untie_head as untie_head
