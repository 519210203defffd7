"""How messages are pickled: large buffers beside the pickle, arrays and tensors in the shortest form.

Pickle supports both (protocol 5 and a pickler's private table of reducers), so other pickles of this process do not
change, and plain pickle can load the result.

    NumPy arrays        up to LARGE_BYTES, of plain numbers and in C order, as a call of `_array`: a call with 320 bytes
                        and back takes 49 instead of 61 us. These own their memory, so they can be resized; with Beam
                        those of up to 1000 bytes do. Others up to LARGE_BYTES as NumPy does it for an older protocol,
                        which Beam's pickles are of, and larger ones as it does it for this one. Read-only ones arrive
                        writable, as with Beam
    tensors of torch    on the CPU, dense, contiguous and without gradient, as a buffer and not as a saved file; like
                        arrays, and unlike tensors that torch pickles, two of them do not share memory afterwards
    other buffers       those that classes wrap in `pickle.PickleBuffer` (pandas, pyarrow); when such a class is
                        unpickled, it may be given any kind of buffer
    what programs register with `multiprocessing.reduction.register`, and views of dicts, which arrive as lists: as
                        with Beam, which sends messages by multiprocessing's own pickler
    sockets, Connections are refused: those are numbers of files of one process. Plain pickle would send the number of a
                        Connection, and the copy would close whatever file has that number in the other process.
                        Multiprocessing hands over the file itself, but only to processes with its own authkey, or to a
                        process that it is just about to spawn

No library is imported for this: a library that has not been imported yet has no objects that could be pickled.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

from mpmm.multi_process_shared.rpc.channel import LARGE_BYTES, Message

__all__ = ["PROTOCOL", "FileRefusedError", "dump", "load", "plain", "refuse_files"]

PROTOCOL = 5
_PLAIN_NUMBERS = "biufc"
_Reducer = Callable[[Any], Any]
# What ForkingPickler keeps for `register`; it has no other way to read it.
_REGISTERED: dict[type, _Reducer] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # not in typeshed
_OF_TORCH = "torch.multiprocessing.reductions"


class FileRefusedError(TypeError):
    """A socket or Connection was to be sent."""


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

    file = io.BytesIO()
    _Pickler(file, PROTOCOL, buffer_callback=keep_in_pickle).dump(thing)
    return Message(file.getvalue(), buffers)


def plain(thing: object) -> bytes:
    """Return a pickle of `thing` with all its buffers in it. Raises what pickle raises."""
    file = io.BytesIO()
    _Pickler(file, PROTOCOL).dump(thing)
    return file.getvalue()


def load(message: Message) -> Any:
    """Return the object that a message carries. May raise anything: unpickling runs code of the object's classes."""
    return pickle.loads(message.head, buffers=message.buffers)


def refuse_files(thing: object) -> None:
    """Raise FileRefusedError if pickle itself would send a number of a file."""
    kind = type(thing)
    if _is_file(kind) and kind not in copyreg.dispatch_table:
        _refuse(thing)


class _Reducers(dict[type, _Reducer]):
    """Reducers by type: ours for arrays, tensors and views of dicts, then multiprocessing's and copyreg's."""

    def __missing__(self, kind: type) -> _Reducer:
        if kind.__module__ in ("numpy", "torch"):
            if kind is getattr(sys.modules.get("numpy"), "ndarray", None):
                self[kind] = _reduce_array
                return _reduce_array
            # Without NumPy, torch does not give access to its tensors' memory.
            if "numpy" in sys.modules and kind is getattr(sys.modules.get("torch"), "Tensor", None):
                self[kind] = _reduce_tensor
                return _reduce_tensor
        reducer = _REGISTERED.get(kind)
        if reducer is None or _is_left_out(reducer):
            reducer = copyreg.dispatch_table.get(kind)
        if reducer is not None:
            return reducer
        if _is_file(kind):
            return _refuse
        raise KeyError(kind)


def _is_file(kind: Any) -> bool:
    """Tell whether objects of a class are files of this process, for which the class does not define a pickle."""
    return issubclass(kind, (socket.socket, Connection)) and not _says_how(kind)


def _says_how(kind: Any) -> bool:
    """Tell whether a class defines how its objects are pickled."""
    return kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__


def _is_left_out(reducer: _Reducer) -> bool:
    """Tell whether a reducer that is registered with multiprocessing is not used here.

    Its own are for methods and partial objects, for which pickle has a better one, for descriptors, and for what
    children inherit. Those of torch would have the processes share memory, which lasts only while both live; but events
    of a GPU can be sent in no other way.
    """
    module = getattr(reducer, "__module__", None) or ""
    if module == _OF_TORCH:
        return getattr(reducer, "__name__", "") != "reduce_event"
    return module.startswith("multiprocessing.")


def _reduce_view(view: Any) -> Any:
    return list, (list(view),)


def _refuse(thing: Any) -> NoReturn:
    raise FileRefusedError(
        f"a {type(thing).__name__} is a file descriptor of this process and cannot be sent to another one: send the "
        "address of a socket or multiprocessing.connection.Listener instead, to which the other process connects"
    )


class _Pickler(pickle.Pickler):
    dispatch_table = _Reducers(
        {type({}.keys()): _reduce_view, type({}.values()): _reduce_view, type({}.items()): _reduce_view}
    )


def _reduce_array(array: Any) -> Any:
    if array.nbytes >= LARGE_BYTES:
        if not array.flags.writeable:
            # NumPy has the buffer of a read-only array arrive read-only; a model that changes its input in place fails.
            array = array.copy(order="K")
        return array.__reduce_ex__(PROTOCOL)
    dtype = array.dtype
    if dtype.kind not in _PLAIN_NUMBERS or dtype.metadata is not None or not array.flags.c_contiguous:
        return array.__reduce__()
    return _array, (array.shape, dtype.str, array.tobytes())


def _array(shape: tuple[int, ...], kind: str, data: bytes) -> Any:
    import numpy

    return numpy.ndarray(shape, kind, data).copy()


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
