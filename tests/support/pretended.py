"""Two pretended devices: real values on the CPU under another device's label, and its rule that devices do not mix.

PyTorch's PrivateUse1 backend, written in Python. `on()` makes the label work; `put` and `move` place tensors and modules.
Registering it changes the process for good: run it in a process of its own (`tests/deployment/devices.py`).

What an accelerator would feel is counted on the way, by place (`at`) and by the line of the package that asked (`sites`):
operations that are dispatched (views too: they cost the host as much), syncs (the host waits for a value) and copies of host
memory to the device. Not covered: streams, memory, kernels of a real device.
"""

from __future__ import annotations

import collections
import contextlib
import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
OURS = ("/vlm_fix/", "/methods/")
aten = torch.ops.aten
MIXES = {  # what PyTorch itself does across devices: copies, and indices that lie on the host
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
SYNCS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
INDEXED = {
    aten.index.Tensor: 1,
    aten.index_put.default: 1,
    aten.index_put_.default: 1,
    aten._index_put_impl_.default: 1,
}
FACTORIES = {
    getattr(torch, name)
    for name in ("tensor", "as_tensor", "arange", "zeros", "ones", "full", "empty", "randn", "rand", "linspace", "eye")
}


counts = collections.Counter()  # (what, `at.place`) -> how often
sites = collections.Counter()  # (what, `at.place`, "file:line") -> how often


class at:
    """Where the model is, which whoever counts sets; `lines`: `sites` are wanted, too."""

    place, lines = None, False


def note(what):
    counts[what, at.place] += 1
    if not at.lines:
        return
    frame = sys._getframe(2)
    while frame and not any(part in frame.f_code.co_filename for part in OURS):
        frame = frame.f_back
    name = "/".join(frame.f_code.co_filename.rsplit("/", 2)[-2:]) if frame else ""
    sites[what, at.place, f"{name}:{frame.f_lineno}" if frame else "elsewhere"] += 1


def register() -> str:
    """Register the backend; why that is not possible, or an empty string."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME)
    except (ImportError, RuntimeError) as error:
        return f"torch {torch.__version__} cannot have a device in Python: {error}"
    return ""


class Pretended(torch.Tensor):
    """A tensor whose values lie in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held, device):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=device, requires_grad=False, **how)
        made.held = held
        return made

    def __repr__(self):
        return f"Pretended({self.held}, {self.device})"

    def tolist(self):
        note("syncs")
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of a device has no numpy(): use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def held(x):
    return x.held if isinstance(x, Pretended) else x


def run(func, args, kwargs):
    """One operation on the values; its result belongs to the device of what went in, or to the one asked for."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, Pretended)]
    host = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if func not in MIXES and (len({t.device for t in here}) > 1 or (here and host)):
        raise RuntimeError(f"{func}: tensors of several devices, {sorted({str(t.device) for t in tensors})}")
    target = here[0].device if here else None
    wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if here:
        note("operations")
        if _waits(func, args, wanted):
            note("syncs")
    if _copies(func, args, here, host, wanted):
        note("copies")
    if wanted is not None:
        target = torch.device(NAME, wanted.index or 0) if wanted.type == NAME else None
        kwargs = {**kwargs, "device": "cpu"}
    out = func(*tree_map(held, args), **tree_map(held, kwargs))
    if func._schema.is_mutable and func.namespace == "aten" and args and isinstance(args[0], torch.Tensor):
        return args[0]
    if target is None:
        return out
    return tree_map(lambda t: Pretended(t, target) if isinstance(t, torch.Tensor) else t, out)


def _waits(func, args, wanted):
    """True if the host needs a value: it asks for it, copies it, or has to know how many a mask chooses."""
    if func in INDEXED:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if func is aten.copy_.default:
        return not isinstance(args[0], Pretended)
    return func in SYNCS or (func is aten._to_copy.default and wanted is not None and wanted.type == "cpu")


def _copies(func, args, here, host, wanted):
    """True if host memory goes to the device; a number is an argument of a kernel."""
    if func is aten._to_copy.default:
        return not here and wanted is not None and wanted.type == NAME
    return func in MIXES and bool(host) and isinstance(args[0], Pretended)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What would look for a real device before it is dispatched: the choice of an attention kernel, constructors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if isinstance(t, Pretended)]
        if func is torch.nn.functional.scaled_dot_product_attention and here:
            if len(here) < len(tensors) or len({t.device for t in here}) > 1:
                raise RuntimeError("attention over tensors of several devices")
            note("operations")
            return Pretended(func(*tree_map(held, args), **tree_map(held, kwargs)), here[0].device)
        if func is torch.Tensor.__getitem__ and here:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in parts):
                chosen = [torch.tensor(part, dtype=torch.long) if isinstance(part, list) else part for part in parts]
                return args[0][tuple(chosen)]
        if func is torch.Tensor.new_tensor and here:
            note("copies")
            return Pretended(held(args[0]).new_tensor(*args[1:], **kwargs), here[0].device)
        wanted = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and here and isinstance(args[0], list):
            note("syncs")  # the host reads each number before it makes a tensor of them
            args, here = tree_map(held, args), []
        if func in FACTORIES and wanted is not None and torch.device(wanted).type == NAME and not here:
            note("copies" if func in (torch.tensor, torch.as_tensor) else "operations")
            with torch._C.DisableTorchFunction():
                made = func(*args, **{**kwargs, "device": "cpu"})
            return Pretended(made, torch.device(NAME, torch.device(wanted).index or 0))
        return func(*args, **kwargs)


@contextlib.contextmanager
def on():
    """The label works inside."""
    with _Functions(), _Dispatch():
        yield


def put(tensor, index=0):
    return Pretended(tensor.detach(), torch.device(NAME, index))


def move(module, index=0):
    """Parameters and buffers of the module to device `index`, in place."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None and not isinstance(value, Pretended):
                part._parameters[name] = torch.nn.Parameter(put(value.data, index), requires_grad=False)
        for name, value in list(part._buffers.items()):
            if value is not None and not isinstance(value, Pretended):
                part._buffers[name] = put(value, index)
    return module
