"""AdaLoRA's budget and penalty against HuggingFace PEFT's over a whole run, and the folder that it ends with."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

import jpeft
from jpeft.core.tree import flatten
from jpeft.errors import AdapterError
from jpeft.training.optimizers.adalora import allocate_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, transformers' and peft's own
IDS = np.random.default_rng(0).integers(3, 61, (4, 9))
STEPS, LEARNING_RATE = 18, 0.3
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "max_position_embeddings": 32, "initializer_range": 0.2}  # fmt: skip


def tensors(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def rank_pattern(folder):
    return json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in torch and here: losses, singular values after each step, and what it ends with."""
    folder = tmp_path_factory.mktemp("adalora")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    base.save_pretrained(folder / "base")
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=3, total_step=15, lora_alpha=6, orth_reg_weight=0.1,
        task_type="CAUSAL_LM",  # without one, PEFT leaves the penalty out
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():  # larger, so that a few steps have an effect
        for module in (
            m for layer in adapted.base_model.model.model.layers for m in (layer.self_attn.q_proj, layer.mlp.down_proj)
        ):
            module.lora_A["default"].mul_(10)
            module.lora_B["default"].mul_(10)
    adapted.save_pretrained(folder / "fresh")
    model, params = jpeft.models.load(folder / "base", scan_layers=True)
    peft, adapter = jpeft.hf.load(folder / "fresh", model, params, jnp.asarray(IDS))

    def loss_fn(adapter, params, batch, rng):
        logits = peft.apply(params, adapter, batch)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean(), {}

    options = {"total_steps": 15, "target_rank": 2, "initial_steps": 2, "final_steps": 4, "interval": 3}
    tx = allocate_ranks(peft, optax.sgd(LEARNING_RATE), **options)
    ours = {}
    for name, used in (("plain", tx), ("masked", jpeft.masked(tx, peft.labels(adapter)))):
        state = jpeft.TrainState.create(peft, adapter, used, jax.random.key(0))
        step, values, losses = jpeft.train_step(peft, loss_fn, used), [], []
        for _ in range(STEPS):
            state, metrics = step(state, params, jnp.asarray(IDS))
            losses.append(float(metrics["loss"] + metrics["penalty"]))
            values.append({path: np.asarray(x) for path, x in flatten(state.adapter).items() if "_e" in path[-1]})
        ours[name] = losses, values, state.adapter

    optimizer, theirs = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], LEARNING_RATE), ([], [])
    for number in range(STEPS):
        ids = torch.tensor(IDS)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        adapted.base_model.update_and_allocate(number)
        optimizer.zero_grad()
        theirs[0].append(float(loss))
        modules = [layer.self_attn.q_proj for layer in adapted.base_model.model.model.layers]
        theirs[1].append(np.stack([m.lora_E["default"].detach().numpy()[:, 0] for m in modules]))
    adapted.save_pretrained(folder / "trained")
    return folder, (model, params), base, adapted, theirs, (peft, ours)


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_a_run_keeps_the_same_triples(name, runs):
    *_, theirs, (_, ours) = runs
    losses, values, _ = ours[name]
    np.testing.assert_allclose(losses, theirs[0], rtol=1e-5)
    assert losses[-1] < losses[0] - 0.05
    queries = [next(x for path, x in own.items() if "q_proj" in path) for own in values]
    worst = max(np.abs(a - b).max() for a, b in zip(queries, theirs[1], strict=True))
    print(f"singular values over {STEPS} steps: max difference {worst:.1e} of {np.abs(theirs[1][-1]).max():.2f}")
    assert worst < 2e-6
    zeros = [sum((x == 0).sum() for x in own.values()) for own in values]
    assert zeros[0] == 0 and zeros[-1] == 12  # of 24 triples, 2 for each of 6 matrices stay
    assert len(set(zeros[3:12])) > 2  # the budget falls in steps, and values grow again in between


def test_the_folder_of_a_pruned_adapter_goes_both_ways(runs, tmp_path):
    folder, (model, params), base, adapted, _, (peft, ours) = runs
    with torch.no_grad():
        want = adapted(torch.tensor(IDS)).logits.numpy()
    read, adapter = jpeft.hf.load(folder / "trained", model, params, jnp.asarray(IDS))
    got = np.asarray(jax.jit(read.apply)(params, adapter, jnp.asarray(IDS)))
    print(f"read from torch: max difference {np.abs(got - want).max():.1e}")
    np.testing.assert_allclose(got, want, atol=1e-4)

    jpeft.hf.save(tmp_path / "back", read, adapter, params)
    theirs, back = tensors(folder / "trained"), tensors(tmp_path / "back")
    assert theirs.keys() == back.keys()
    jax.tree.map(np.testing.assert_array_equal, back, theirs)
    assert rank_pattern(tmp_path / "back") == rank_pattern(folder / "trained")

    jpeft.hf.save(tmp_path / "ours", peft, ours["plain"][2], params)
    assert rank_pattern(tmp_path / "ours") == rank_pattern(folder / "trained")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(torch.tensor(IDS)).logits.numpy(), want, atol=1e-4)


def test_a_mask_of_another_length_is_refused(runs, tmp_path):
    folder, (model, params), *_ = runs
    for file in (folder / "trained").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    name = next(iter(config["rank_pattern"]))
    config["rank_pattern"][name] = [True, False]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"rank_pattern has 2 entries for .*expected init_r=4"):
        jpeft.hf.load(tmp_path, model, params, jnp.asarray(IDS))
