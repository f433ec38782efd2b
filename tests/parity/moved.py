"""Adapters that are made and moved from their start in PEFT, on torch modules of our own."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model


def saved(net: Any, config: Any, folder: Path, inputs: np.ndarray) -> np.ndarray:
    """The outputs of an adapter of a copy of ``net``, which differ from the net's; saves it in ``folder``."""
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(net), config)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.5 * torch.randn_like(p) * p.requires_grad)
        want = adapted(torch.tensor(inputs)).numpy()
        assert np.abs(want - net(torch.tensor(inputs)).numpy()).max() > 1e-2
    adapted.save_pretrained(folder)
    return want
