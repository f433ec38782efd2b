"""A new method is one file and one line: ``lora_fa.py`` beside this file, and its registration.

The contract suite finds it by itself; scans, experts, convolutions, shardings, saving and loading come with it.
"""

from dataclasses import dataclass

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jpeft
from jpeft.core.tree import flatten
from tests import contract, zoo
from tests.methods.lora_fa import LoRAFA


@pytest.fixture(autouse=True)
def registered():
    """The one line; forgotten afterwards."""
    jpeft.methods.register(LoRAFA)
    yield
    del jpeft.methods.METHODS["LoRAFA"]


@pytest.fixture
def entry():
    return zoo.table()["LoRAFA"]


@pytest.mark.parametrize(("use", "mode", "dtype"), [
    ("dense", "plain", "float32"), ("einsum, experts", "scan", "float32"), ("conv 2-D grouped", "scan", "float32"),
    ("embed, tied by attend", "plain", "float32"), ("fused qkv", "remat", "bfloat16"), ("raw", "scan", "float32"),
])  # fmt: skip
def test_the_law_holds(entry, use, mode, dtype):
    contract.check_law({"LoRAFA": entry}, use, mode, dtype)


def test_the_rest_of_the_contract_holds(entry, tmp_path):
    contract.check_learns({"LoRAFA": entry}, "dense", "scan")
    contract.check_stacks({"LoRAFA": entry}, "dense")
    contract.check_saves(entry, tmp_path / "adapter")
    contract.check_trees(entry)
    contract.check_abstract(entry)


def test_its_leaves_follow_the_shardings_of_the_base(entry):
    peft, _, params, _ = contract.bound(entry, "dense")
    mesh = jax.make_mesh((2,), ("fsdp",))
    base = jpeft.shard(params, mesh, [(".*kernel", PartitionSpec(None, "fsdp"))])
    leaves = {path[-1]: leaf for path, leaf in flatten(peft.init(jax.random.key(0), base)).items()}
    assert leaves["fa_a"].sharding.spec == PartitionSpec() and leaves["fa_b"].sharding.spec == PartitionSpec(
        None, "fsdp"
    )


def test_what_does_not_train_is_labeled_counted_and_left_alone(entry):
    peft, _, params, x = contract.bound(entry, "dense")
    adapter = peft.init(jax.random.key(0), params)
    labels = flatten(peft.labels(adapter))
    assert {path[-1]: label for path, label in labels.items()} == {"fa_a": "frozen", "fa_b": "trainable"}
    assert "24 trainable" in peft.summary() and "16 not trainable" in peft.summary() and "rank" in peft.summary()
    loss_fn = lambda a, p, batch, rng: ((peft.apply(p, a, batch) ** 2).mean(), {})  # noqa: E731
    tx = optax.sgd(0.5)
    state, _ = jpeft.train_step(peft, loss_fn, tx)(
        jpeft.TrainState.create(peft, adapter, tx, jax.random.key(1)), params, x
    )
    before, after = flatten(adapter), flatten(state.adapter)
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path[-1] == "fa_a")


def test_a_field_called_dropout_is_the_rate_of_base_dropout():
    @dataclass(frozen=True, kw_only=True)
    class Dropped(LoRAFA):
        dropout: float = 0.5

        def apply(self, leaves, base, x):
            return base(x) + base.dropout(x, self.dropout) @ leaves["fa_a"] @ leaves["fa_b"]

    peft, _, params, x = contract.bound(zoo.Entry(lambda use: Dropped(targets=use.targets)), "dense")
    adapter = zoo.moved(peft, params)
    dropped = peft.apply(params, adapter, x, rngs={"dropout": jax.random.key(0)})
    assert contract.differ(dropped, peft.apply(params, adapter, x))


def test_the_old_name_of_leaves_that_do_not_train_is_refused():
    with pytest.raises(TypeError, match=r"Old\.fixed is called non_trainable now; rename it"):

        class Old(LoRAFA):
            fixed = frozenset({"fa_a"})


def test_a_name_that_is_taken_is_refused():
    class LoRA(jpeft.methods.WeightMethod):
        pass

    with pytest.raises(ValueError, match="there is another method called LoRA"):
        jpeft.methods.register(LoRA)
    with pytest.raises(TypeError, match="expected a subclass of WeightMethod"):
        jpeft.methods.register(jpeft.methods.Chain)
    assert jpeft.methods.METHODS["LoRA"] is jpeft.LoRA
