"""Transformations of gradients and updates for the leaves of particular methods, for optax."""

from jpeft.training.optimizers.adalora import allocate_ranks as allocate_ranks
from jpeft.training.optimizers.lora_fa import lora_fa as lora_fa
from jpeft.training.optimizers.lora_plus import lora_plus as lora_plus
from jpeft.training.optimizers.riemannian import riemannian as riemannian
