"""The adapted model as a Linen module."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax.core import lift, unfreeze

from jpeft.core.peft import Peft
from jpeft.core.tree import combine, flatten
from jpeft.linen import inject


class PeftModule(nn.Module):
    """The adapted model as a module.

    Its parameters are ``combine(params, adapter)``, with the model's own paths.

    Attributes:
      peft: the bound method, with the model.
    """

    peft: Peft

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """``model.apply`` on the full tree; ``method=`` and captured intermediates refer to the model."""
        params, adapter = self.peft.split(variables["params"])
        others = {k: v for k, v in variables.items() if k != "params"}
        return self.peft.apply({"params": params, **others} if others else params, adapter, *args, **kwargs)

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call inside a larger module, or under ``init`` and ``bind``."""
        peft, scope = self.peft, self.scope
        assert scope is not None
        if self.is_initializing() and not _has_adapter(peft, scope.variables().get("params", {})):
            y = peft.model.clone(parent=scope, name=None)(*args, **kwargs)
            params = unfreeze(dict(scope.variables()["params"]))
            adapter = unfreeze(peft.init(self.make_rng("params"), params))
            for name, value in combine(params, adapter).items():
                scope.put_variable("params", name, value)
            return y

        def body(inner: Any, *args: Any) -> Any:
            with inject.intercept(peft, inner.path):
                return peft.model.clone(parent=inner, name=None)(*args, **kwargs)

        def overlaid(variables: Any) -> Any:
            full = variables.get("params")
            return {**variables, "params": peft.overlay(*peft.split(full))} if full else variables

        return lift.map_variables(body, "params", overlaid, mutable=False)(scope, *args)


def _has_adapter(peft: Peft, params: Any) -> bool:
    found = flatten(params)
    return all(p in found for p, _ in peft.structure)
