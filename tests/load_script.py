"""Imports a script as a module: scripts/ is no package, its files find each other through sys.path."""

import importlib
import sys

from helpers import ROOT


def load_script(name: str):
    folder = str(ROOT / "scripts")
    if folder not in sys.path:
        sys.path.append(folder)  # behind everything else: no script may shadow an installed package
    return importlib.import_module(name)
