"""How messages are pickled: large buffers beside the pickle, arrays and tensors in the shortest form.

Pickle supports both (protocol 5 and a pickler's private table of reducers), so other pickles of this process do not
change, and plain pickle can load the result.

    NumPy arrays        up to LARGE_BYTES, of plain numbers and in C order, as the call of `numpy.ndarray` that makes
                        them: a call with 320 bytes and back takes 47 instead of 61 us. All others as NumPy does it.
                        Read-only ones arrive writable, as with Beam, whose pickles are of an older protocol.
    tensors of torch    on the CPU, dense, contiguous and without gradient, as a buffer and not as a saved file; like
                        arrays, and unlike tensors that torch pickles, two of them do not share memory afterwards
    other buffers       those that classes wrap in `pickle.PickleBuffer` (pandas, pyarrow); when such a class is
                        unpickled, it may be given any kind of buffer

No library is imported for this: a library that has not been imported yet has no objects that could be pickled.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

from mpmm.multi_process_shared.rpc.channel import LARGE_BYTES, Message

__all__ = ["PROTOCOL", "dump", "load"]

PROTOCOL = 5
_PLAIN_NUMBERS = "biufc"
_Reducer = Callable[[Any], Any]


def dump(thing: object) -> Message:
    """Return a pickle of `thing`, and its buffers of LARGE_BYTES or more. Raises what pickle raises."""
    buffers: list[memoryview] = []

    def keep_in_pickle(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        # bytes and bytearray must arrive as such, and not as a view, which cannot be pickled again.
        if view.nbytes < LARGE_BYTES or type(view.obj) in (bytes, bytearray):
            return True
        buffers.append(view)
        return False

    if "numpy" not in sys.modules:
        # Without NumPy, torch does not give access to its tensors' memory.
        return Message(pickle.dumps(thing, PROTOCOL, buffer_callback=keep_in_pickle), buffers)
    file = io.BytesIO()
    _Pickler(file, PROTOCOL, buffer_callback=keep_in_pickle).dump(thing)
    return Message(file.getvalue(), buffers)


def load(message: Message) -> Any:
    """Return the object that a message carries. May raise anything: unpickling runs code of the object's classes."""
    return pickle.loads(message.head, buffers=message.buffers)


class _Reducers(dict[type, _Reducer]):
    """Reducers by type: ours for arrays and tensors, copyreg's for the rest."""

    def __missing__(self, kind: type) -> _Reducer:
        if kind.__module__ in ("numpy", "torch"):
            if kind is getattr(sys.modules.get("numpy"), "ndarray", None):
                self[kind] = _reduce_array
                return _reduce_array
            if kind is getattr(sys.modules.get("torch"), "Tensor", None):
                self[kind] = _reduce_tensor
                return _reduce_tensor
        reducer: _Reducer = copyreg.dispatch_table[kind]
        return reducer


class _Pickler(pickle.Pickler):
    dispatch_table = _Reducers()


def _reduce_array(array: Any) -> Any:
    dtype = array.dtype
    if (
        array.nbytes >= LARGE_BYTES
        or dtype.kind not in _PLAIN_NUMBERS
        or dtype.metadata is not None
        or not array.flags.c_contiguous
    ):
        if not array.flags.writeable:
            # NumPy has the buffer of a read-only array arrive read-only; a model that changes its input in place fails.
            array = array.copy(order="K")
        return array.__reduce_ex__(PROTOCOL)
    return type(array), (array.shape, dtype.str, bytearray(array.data))


def _reduce_tensor(tensor: Any) -> Any:
    torch = sys.modules["torch"]
    if (
        tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.requires_grad
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
        or not tensor.is_contiguous()
        or not tensor.numel()
        or vars(tensor)
    ):
        return tensor.__reduce_ex__(PROTOCOL)
    # As bytes, because NumPy does not know all of torch's number types.
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(data), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _tensor(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape)
