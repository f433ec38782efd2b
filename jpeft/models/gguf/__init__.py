"""GGUF files of Llama-family decoders: their config, tensors and tokenizer in the form that HuggingFace publishes."""

from jpeft.models.gguf.adapter import write_adapter as write_adapter
from jpeft.models.gguf.config import read_config as read_config
from jpeft.models.gguf.file import open_file as open_file
from jpeft.models.gguf.tensors import open_tensors as open_tensors
from jpeft.models.gguf.tokenizer import read_chat_template as read_chat_template
from jpeft.models.gguf.tokenizer import read_special_tokens as read_special_tokens
from jpeft.models.gguf.tokenizer import read_tokenizer as read_tokenizer
from jpeft.models.gguf.tokenizer import stop_ids as stop_ids
from jpeft.models.gguf.tokenizer import write_tokenizer as write_tokenizer
