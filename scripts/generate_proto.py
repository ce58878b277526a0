# SPDX-License-Identifier: Apache-2.0
"""Regenerate `trustme_init/proto/*_pb2.py` and `.pyi` from the `.proto` files.

The generated modules are committed so that neither the device build nor an image builder needs a
protocol-buffer compiler; tests/unit/proto checks that they are what this script makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(destination: Path) -> None:
    """Write the modules below `destination` (package root), raising RuntimeError if protoc refuses."""
    source = ROOT / "src"
    protos = sorted(str(path) for path in (source / "trustme_init/proto").glob("*.proto"))
    plugin = Path(sys.executable).with_name("protoc-gen-mypy")
    status = protoc.main(
        [
            "protoc",
            f"-I{source}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={destination}",
            f"--plugin=protoc-gen-mypy={plugin}",
            f"--mypy_out=quiet:{destination}",
            *protos,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "src")
