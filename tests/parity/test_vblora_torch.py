"""Folders of VB-LoRA that hold only the mixtures: ``save_only_topk_weights``."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, VBLoRAConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, transformers' and peft's own
IDS = np.random.default_rng(0).integers(3, 61, (2, 9))
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 32, "initializer_range": 0.2}  # fmt: skip
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(folder)
    return model, jpeft.models.load(folder, scan_layers=True)


def saved(base, folder, topk, num_vectors=12):
    """An adapter's outputs in torch; its folder holds indices and weights."""
    config = VBLoRAConfig(
        r=2, topk=topk, num_vectors=num_vectors, vector_length=8, save_only_topk_weights=True, init_logits_std=2.0,
        init_vector_bank_bound=0.7, target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("topk, num_vectors, kind", [(3, 12, "uint8"), (1, 300, "int16")])
def test_mixtures_become_logits(topk, num_vectors, kind, base, tmp_path):
    torch_model, (model, params) = base
    want = saved(torch_model, tmp_path / "theirs", topk, num_vectors)
    kinds = {x.dtype.name for name, x in load_file(tmp_path / "theirs" / FILE).items() if name.endswith("_indices")}
    assert kinds == {kind}
    peft, adapter = jpeft.hf.load(tmp_path / "theirs", model, params, jnp.asarray(IDS))
    got = np.asarray(jax.jit(peft.apply)(params, adapter, jnp.asarray(IDS)))
    print(f"read from torch: max difference {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")
    np.testing.assert_allclose(got, want, atol=1e-4)
    # Written with whole logits, which PEFT can train further.
    jpeft.hf.save(tmp_path / "back", peft, adapter, params)
    with torch.no_grad():
        back = PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path / "back").eval()
        np.testing.assert_allclose(back(torch.tensor(IDS)).logits.numpy(), want, atol=1e-4)


def test_indices_that_do_not_fit_and_missing_weights_are_refused(base, tmp_path):
    torch_model, (model, params) = base
    saved(torch_model, tmp_path, 3)
    tensors = load_file(tmp_path / FILE)
    name = next(name for name in tensors if name.endswith("_indices"))
    for index, expected in (
        (12, "indices outside of the bank of num_vectors=12"),
        (3, "an index twice in one mixture"),
    ):
        save_file(tensors | {name: np.full_like(tensors[name], index)}, tmp_path / FILE)
        with pytest.raises(AdapterError, match=expected):
            jpeft.hf.load(tmp_path, model, params, jnp.asarray(IDS))
    weights = name.replace("indices", "weights")
    save_file({key: x for key, x in tensors.items() if key != weights}, tmp_path / FILE)
    with pytest.raises(AdapterError, match=f"needs a '{weights}' of one fewer"):
        jpeft.hf.load(tmp_path, model, params, jnp.asarray(IDS))
