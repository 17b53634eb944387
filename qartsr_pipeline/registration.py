"""Registers our quantizer with diffusers: at once if diffusers is imported, otherwise as soon as it is."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

TABLES = "diffusers.quantizers.auto"  # the module whose tables list the quantization methods


class _RegisterAfterImport(MetaPathFinder):
    """Finds nothing itself; has our quantizer registered right after diffusers' tables are made."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: object) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    from qartsr_pipeline.quantization.diffusers_quantizer import register

    register()


def register_with_diffusers() -> None:
    """Doing it twice changes nothing."""
    if TABLES in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
