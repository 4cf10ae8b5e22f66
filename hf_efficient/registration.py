"""Registers the architectures and the attention "favor" with transformers, without importing it before the user does.

Registering needs the classes themselves, and with them torch and a good part of transformers: seconds. So it happens
when transformers' own Auto modules are imported, which nobody can do without before using an Auto class. It waits
until no module of transformers or of this package is halfway through its import, because `modeling_auto` is mostly
imported from the middle of modules that our models need in turn (`modeling_layers`, `generation`, ...).
"""

import importlib
import sys
import threading
from contextlib import contextmanager

from .registry import ARCHITECTURES, resolve


CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
MODELING_AUTO = "transformers.models.auto.modeling_auto"
MODELING_UTILS = "transformers.modeling_utils"

_WATCHED = ("transformers.", f"{__package__}.")


def register_with_transformers(attention: str | None = None) -> None:
    """Register now what can be registered now, and the rest when the modules of transformers are imported.

    Args:
        attention: "module:function" of this package, to be called when attention implementations can be registered.
    """
    if attention is not None and attention not in _known_attention:
        _known_attention.add(attention)
        _pending[MODELING_UTILS] = lambda: resolve(attention)()
    # Also after a reload of the package: a second finder would do no harm, but no good either.
    if _finder not in sys.meta_path and _pending:
        sys.meta_path.insert(0, _finder)
    _register_what_is_ready()


def _register_configs() -> None:
    auto_config = importlib.import_module(CONFIGURATION_AUTO).AutoConfig
    for model_type, architecture in ARCHITECTURES.items():
        auto_config.register(model_type, architecture.config_class())


def _register_models() -> None:
    modeling_auto = importlib.import_module(MODELING_AUTO)
    for architecture in ARCHITECTURES.values():
        for auto_class, model_class in architecture.model_classes().items():
            getattr(modeling_auto, auto_class).register(architecture.config_class(), model_class)


# What is still to be done once the named module is there.
_pending = {CONFIGURATION_AUTO: _register_configs, MODELING_AUTO: _register_models}
_known_attention: set[str] = set()
_thread = threading.local()  # .depth: how many watched modules this thread is importing right now


def _register_what_is_ready() -> None:
    for module in (CONFIGURATION_AUTO, MODELING_AUTO, MODELING_UTILS):
        # Taken out before it is done: several threads come here.
        if module not in sys.modules or (register := _pending.pop(module, None)) is None:
            continue
        try:
            with _importing():  # what registering imports must not lead here again
                register()
        except Exception as error:
            _pending[module] = register
            raise ImportError(
                f"{__package__} could not register its models or attention with {module}: {error}"
            ) from error
    if not _pending and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


@contextmanager
def _importing():
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


class _WatchingFinder:
    """Finds what the other finders find, with a loader that tells when a watched import is over."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(_WATCHED):
            return None
        for finder in list(sys.meta_path):
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _WatchingLoader(spec.loader)
                return spec
        return None


class _WatchingLoader:
    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # The module keeps its true loader: inspect, pkgutil and importlib.resources ask it for sources and files.
        module.__loader__ = module.__spec__.loader = self._loader
        with _importing():
            self._loader.exec_module(module)
        if _thread.depth == 0:
            _register_what_is_ready()


_finder = _WatchingFinder()
