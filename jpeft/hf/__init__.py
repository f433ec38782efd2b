"""HuggingFace PEFT folders, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

A method takes part by declaring an `HFSpec` in its own file, such as `LoRA.hf` in ``methods/lora.py``. This package
reads and writes folders from these declarations; it holds what all PEFT types have in common.

A torch module is named like the owner of its weight in the tree, with ``.`` for ``/``. The leaves of a LoRA at
``encoder/layer/0/attention/self/query`` are ``base_model.model.encoder.layer.0.attention.self.query.lora_A.weight``
``[r, in]`` and ``….lora_B.weight`` ``[out, r]``.

The layers that a decoder of `jpeft.models` keeps stacked, ``model/layers/self_attn/q_proj [layers, in, out]``, are
separate modules in torch, ``model.layers.0.self_attn.q_proj``. `jpeft.hf.tied` describes tied heads.
"""

from jpeft.hf.exporting import save as save
from jpeft.hf.importing import load as load
from jpeft.hf.servers import save_for as save_for
