"""Make transformers' Auto classes know ours, without importing either until somebody uses them.

``AutoConfig.register(...)`` at import would load transformers' modeling code, about three seconds that a script which
only wants a metric or a recipe should not pay. So registration waits for the module that defines the Auto classes.

Image processors are not registered: ``AutoImageProcessor`` finds transformers' own class by the name in
``preprocessor_config.json``, and in transformers 5.23 a registered one breaks ``ProcessorMixin`` for custom processors.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

CONFIG_FILE = "transformers.models.auto.configuration_auto"
# Our files need modeling_layers, which itself imports modeling_auto half-way: the models are registered when none of
# them is in the middle of being imported.
MODEL_FILES = (
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_layers",
    f"{__package__}.modeling.modeling_equissl",
    f"{__package__}.modeling.base_equissl",
    f"{__package__}.modeling.decoders_equissl",
    f"{__package__}.modeling.layers_equissl",
    f"{__package__}.modeling.pyramid_equissl",
)


def _register_config() -> None:
    from transformers import AutoConfig

    from .modeling import EquiSSLConfig, FeaturePyramidConfig

    for config in (EquiSSLConfig, FeaturePyramidConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification

    from .modeling import (
        EquiSSLBackbone,
        EquiSSLConfig,
        EquiSSLForImageClassification,
        EquiSSLModel,
        FeaturePyramidBackbone,
        FeaturePyramidConfig,
    )

    AutoModel.register(EquiSSLConfig, EquiSSLModel, exist_ok=True)
    AutoModelForImageClassification.register(EquiSSLConfig, EquiSSLForImageClassification, exist_ok=True)
    AutoBackbone.register(EquiSSLConfig, EquiSSLBackbone, exist_ok=True)
    AutoBackbone.register(FeaturePyramidConfig, FeaturePyramidBackbone, exist_ok=True)


class _NotifyingLoader(Loader):
    """The real loader, which tells the finder when a module begins and ends."""

    def __init__(self, loader: Loader, finder: _RegisteringFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.finder.loading.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.loading.discard(module.__name__)
        module.__loader__ = self.loader
        self.finder.note_loaded(module.__name__)


class _RegisteringFinder(MetaPathFinder):
    """Watches the few files that registration depends on and leaves every other import alone."""

    def __init__(self) -> None:
        self.waiting = {name for name in (CONFIG_FILE, *MODEL_FILES) if name not in sys.modules}
        self.loading: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _NotifyingLoader(spec.loader, self)
        return spec

    def note_loaded(self, fullname: str) -> None:
        """Register what has become possible."""
        if fullname == CONFIG_FILE:
            _register_config()
        elif not self.loading.intersection(MODEL_FILES) and MODEL_FILES[0] in sys.modules:
            _register_models()


def register_auto_classes() -> None:
    """Register now what is loaded already, and the rest when it is loaded. Calling it again changes nothing."""
    if any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        return
    finder = _RegisteringFinder()
    sys.meta_path.insert(0, finder)
    for name in (CONFIG_FILE, MODEL_FILES[0]):
        if name in sys.modules:
            finder.note_loaded(name)
