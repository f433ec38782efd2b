"""Linen models that read and write HuggingFace folders."""

from jpeft.models.loading import FAMILIES as FAMILIES
from jpeft.models.loading import ModelError as ModelError
from jpeft.models.loading import load as load
from jpeft.models.loading import save as save
