"""The original's import name. The code is in flowturbo/transport/; `transport.path` is `flowturbo.transport.path`."""

import sys
from importlib import import_module
from pkgutil import iter_modules

from flowturbo import transport
from flowturbo.transport import *  # noqa: F403

for _name in [module.name for module in iter_modules(transport.__path__)]:
    globals()[_name] = sys.modules[f"{__name__}.{_name}"] = import_module(f"{transport.__name__}.{_name}")
