"""HuggingFace PEFT folders, both ways: ``adapter_config.json`` and ``adapter_model.safetensors`` of a LoRA.

A torch module is named like the owner of its weight in the tree, with ``.`` for ``/``. The leaves at
``encoder/layer/0/attention/self/query`` are ``base_model.model.encoder.layer.0.attention.self.query.lora_A.weight``
``[r, in]`` and ``….lora_B.weight`` ``[out, r]``; an embedding's are ``….lora_embedding_A`` ``[r, vocabulary]`` and
``….lora_embedding_B`` ``[features, r]``; a convolution's ``[r, in, window…]`` and ``[out, r, 1…]``.

The layers that a decoder of `jpeft.models` keeps stacked, ``model/layers/self_attn/q_proj [layers, in, out]``, are
torch's one by one, ``model.layers.0.self_attn.q_proj``; `jpeft.hf.tied` says what becomes of a tied head.
"""

from jpeft.hf.exporting import save as save
from jpeft.hf.importing import load as load
