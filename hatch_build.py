"""Compiles the native kernels into the wheel, or in place where the install is editable.

Without a C++ compiler the wheel is a pure Python one, and `runtime.ops.fused` computes with torch.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "src/stepquant/runtime/ops/native"


class NativeKernels(BuildHookInterface[Any]):
    """What hatchling calls before it makes a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; if that worked, say that the wheel is for this platform and any Python 3."""
        build = _load(Path(self.root, FOLDER, "build.py"))
        why_not = build.build()
        if why_not is not None:
            self.app.display_warning(f"stepquant is built without native kernels: {why_not}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(build)}"
        # git ignores the library, so hatchling would too.
        build_data["artifacts"].append(f"{FOLDER}/{build.LIBRARY.name}")


def _platform(build: ModuleType) -> str:
    """The platform of the wheel. A Mac's Python may be for two CPUs, the library is for one."""
    if sys.platform == "darwin":
        return f"macosx_{build.MAC_VERSION.replace('.', '_')}_arm64"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _load(path: Path) -> ModuleType:
    """The module at `path`; its package cannot be imported, torch may not be there."""
    spec = importlib.util.spec_from_file_location("stepquant_native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
