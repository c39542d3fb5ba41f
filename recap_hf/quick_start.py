"""A quicker start for the commands that caption: what captioning never runs is imported when it is first used.

Most of the seconds before a first caption are spent on importing transformers and torch, and much of what these
import is for training on several machines (`torch.distributed.tensor`, and sympy with it), for torch's compiler and
for losses of object detection (SciPy). [`quick_start`] lets the imports of one block of code pass these by: the names
that are taken from them are stand-ins which import their module when they are first called or looked into. Nothing of
torch or transformers is changed, and after the block everything is imported as usual. It is for a process of one's
own, such as a command: a library must not do this to its users.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any, Union

# What transformers' model classes import and captioning does not run, with all that is below it.
DEFERRED = (
    "accelerate",
    "scipy.optimize",
    "sklearn",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.generation.continuous_batching.cache",
    "transformers.integrations.flex_attention",
    # These look into `torch.distributed.tensor` while they are imported.
    "transformers.distributed.expert_parallel",
    "transformers.distributed.sharding_utils",
    "transformers.distributed.tensor_parallel",
)


class DeferredName:
    """A name in a module that is imported when the name is first used.

    Asking whether something is an instance does not import: of a class that nobody has imported there is none.
    """

    def __init__(self, module: str, name: str, finder: _DeferringFinder) -> None:
        self._module, self._name, self._finder = module, name, finder

    def _resolve(self) -> Any:
        self._finder.withdraw(self._module)
        module = importlib.import_module(self._module)
        try:
            return getattr(module, self._name)
        except AttributeError:
            # `from package import module` asks for a module like this.
            return importlib.import_module(f"{self._module}.{self._name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], FunctionType) and self._finder.is_active:
            return self._decorated(*args, **kwargs)
        return self._resolve()(*args, **kwargs)

    def _decorated(self, function: FunctionType, *args: Any, **kwargs: Any) -> FunctionType:
        """What a decorator makes of a function, made when that is first called."""
        made: list[Any] = []

        @functools.wraps(function)
        def decorated(*inner: Any, **named: Any) -> Any:
            if not made:
                made.append(self(function, *args, **kwargs))
            return made[0](*inner, **named)

        return decorated

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # What `typing` and others probe objects for.
            raise AttributeError(name)
        return getattr(self._resolve(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        return self._module in sys.modules and isinstance(instance, self._resolve())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._module in sys.modules and issubclass(subclass, self._resolve())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._resolve(),)

    def __or__(self, other: Any) -> Any:
        # An annotation: `DTensor | None`.
        return Union[self, other]  # noqa: UP007

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007

    def __repr__(self) -> str:
        return f"<{self._module}.{self._name}, imported when used>"


class _DeferredModule(ModuleType):
    """Stands for a module; whatever is asked of it is a [`DeferredName`]."""

    def __init__(self, name: str, finder: _DeferringFinder) -> None:
        super().__init__(name)
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        deferred = DeferredName(self.__name__, name, self._finder)
        return deferred._resolve() if name == "__version__" else deferred


class _DeferringFinder(MetaPathFinder, Loader):
    """Finds stand-ins for the deferred modules while a [`quick_start`] lasts."""

    def __init__(self, deferred: Sequence[str]) -> None:
        self.deferred = list(deferred)
        self.modules: list[_DeferredModule] = []
        self.is_active = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if self._root_of(fullname) else None

    def _root_of(self, fullname: str) -> str | None:
        return next((root for root in self.deferred if fullname == root or fullname.startswith(f"{root}.")), None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.modules.append(_DeferredModule(spec.name, self))
        return self.modules[-1]

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""

    def withdraw(self, fullname: str) -> None:
        """Defers the module of this name no longer: takes the stand-ins of it and its neighbours back."""
        root = self._root_of(fullname)
        if root is None:
            return
        for module in [module for module in self.modules if self._root_of(module.__name__) == root]:
            self.modules.remove(module)
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
            parent, _, child = module.__name__.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(child) is module:
                delattr(sys.modules[parent], child)
        self.deferred.remove(root)


@contextlib.contextmanager
def quick_start(deferred: Sequence[str] = DEFERRED) -> Iterator[None]:
    """Imports inside go without `deferred` (unless these are imported already) and without garbage collection.

    Args:
        deferred (`Sequence[str]`, *optional*): modules, each with all modules below it.

    What is imported inside is kept from later collections too: modules live as long as the process.
    """
    finder = _DeferringFinder([name for name in deferred if name not in sys.modules])
    was_enabled = gc.isenabled()
    gc.disable()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.is_active = False
        for root in list(finder.deferred):
            finder.withdraw(root)
        gc.freeze()
        if was_enabled:
            gc.enable()


__all__ = ["DEFERRED", "DeferredName", "quick_start"]
