"""jpeft: parameter-efficient fine-tuning for JAX and Flax, as transforms of a parameter tree."""

from typing import Any

import lazy_loader

from jpeft._moved import find as _find_moved

# The names are those of __init__.pyi. Each is imported when it is first used: `import jpeft` does not even import JAX,
# so that the command line starts fast.
_import_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if (module := _find_moved(name)) is not None:
        return module
    try:
        return _import_name(name)
    except AttributeError:
        raise AttributeError(f"module 'jpeft' has no attribute {name!r}") from None
