"""Messages between two processes, without processes: what is in them, and the memory that they travel through."""

from __future__ import annotations

import contextlib
import copyreg
import errno
import fcntl
import functools
import importlib.util
import mmap
import multiprocessing
import os
import pickle
import socket
import struct
import sys
import threading
from collections.abc import Generator, Iterator
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from harness import in_child, in_thread, open_descriptors
from patience import DEADLINE_S

from mpmm.errors import InvalidArgumentError, RemoteCallError
from mpmm.multi_process_shared.rpc import channel, pickling, protocol, receive_buffers, shared_buffer, sockets
from mpmm.multi_process_shared.rpc.channel import LARGE_BYTES, Channel, Message
from mpmm.multi_process_shared.rpc.protocol import RemoteTraceback, decode_answer, encode_error, encode_result
from mpmm.multi_process_shared.rpc.receive_buffers import (
    ALIGNMENT,
    SLAB_BYTES,
    SMALLEST_SLAB_BYTES,
    SPARE_BYTES,
    drop_spare_slabs,
    receive_memory,
)
from mpmm.multi_process_shared.rpc.shared_buffer import (
    LEAST_AVAILABLE_BYTES,
    LIMIT_VARIABLE,
    SHARED_BUFFER_BYTES,
    SLOT_BYTES,
    SharedBuffer,
    create_shared_buffer,
)
from mpmm.multi_process_shared.rpc.sockets import NO_SIGNAL, PROTOCOL_VERSION, ForkSafeSocket

needs_sealed_files = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has files that are sealed")


# Pickles.


def test_only_large_buffers_that_are_no_bytes_travel_beside_the_pickle() -> None:
    for size, beside in ((LARGE_BYTES - 1, 0), (LARGE_BYTES, 1)):
        array = np.arange(size, dtype=np.uint8)
        for numbers, count in ((array, beside), (array.data, beside)):
            thing: Any = pickle.PickleBuffer(numbers) if isinstance(numbers, memoryview) else numbers
            message = pickling.dump(thing)
            assert len(message.buffers) == count, size
            assert bytes(pickling.load(message)) == array.tobytes()
        for kind in (bytes, bytearray):
            message = pickling.dump(pickle.PickleBuffer(kind(size)))
            assert not message.buffers
            assert type(pickling.load(message)) is kind


def test_a_process_without_numpy_sends_large_buffers_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    large = np.arange(LARGE_BYTES, dtype=np.uint8)
    monkeypatch.delitem(sys.modules, "numpy")
    message = pickling.dump(pickle.PickleBuffer(large.data))
    assert [bytes(buffer) for buffer in message.buffers] == [large.tobytes()]
    assert pickling.load(pickling.dump({"a": 1})) == {"a": 1}


class OwnConnection(Connection):
    """A connection of a program's own class."""


class SaysHow(socket.socket):
    """A socket whose class says how it is pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, ("says how",)


class Pet:
    """Pickled as a program has registered it with multiprocessing."""


def reduce_pet(pet: Pet) -> Any:
    return str, ("as registered",)


@pytest.mark.parametrize("has_numpy", [True, False])
def test_types_are_pickled_as_registered_and_bare_descriptors_are_refused(
    has_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_numpy:
        monkeypatch.delitem(sys.modules, "numpy")
    monkeypatch.setitem(pickling._REGISTERED, Pet, reduce_pet)
    assert pickling.load(pickling.dump([Pet()])) == ["as registered"]
    assert pickle.loads(pickling.plain(Pet())) == "as registered"
    assert pickling.load(pickling.dump({1: 2}.items())) == [(1, 2)]
    # Better than multiprocessing, which leaves its attributes out.
    part = functools.partial(int, base=2)
    part.__dict__["note"] = "kept"
    assert vars(pickling.load(pickling.dump(part))) == {"note": "kept"}
    assert pickling.load(pickling.dump([1].count))(1) == 1
    first, second = socket.socketpair()
    with first, second, Connection(os.dup(first.fileno())) as line, OwnConnection(os.dup(first.fileno())) as own:
        for thing in (first, line, own):
            for dump in (pickling.dump, pickling.plain):
                with pytest.raises(TypeError, match=f"a {type(thing).__name__} is a file descriptor of this process"):
                    dump(["deep", thing])
        with SaysHow(fileno=os.dup(first.fileno())) as says:
            assert pickling.load(pickling.dump(says)) == "says how"
        # A program may know a way.
        monkeypatch.setitem(pickling._REGISTERED, Connection, reduce_pet)
        assert pickling.load(pickling.dump(line)) == "as registered"


def test_an_exception_leaves_a_bare_descriptor_behind() -> None:
    first, second = socket.socketpair()
    with first, second, Connection(os.dup(first.fileno())) as line:
        own: Any = raised_by(Own("one", two=line))
        assert vars(own) == {"one": "one"}
        found = raised_by(ValueError(line))
        assert type(found) is RemoteCallError


def test_tensors_are_not_shared_as_torch_registers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce_storage(thing: object) -> Any:
        return str, ("shared",)

    def reduce_event(thing: object) -> Any:
        return str, ("event",)

    for reducer, expected in ((reduce_storage, Pet), (reduce_event, str)):
        monkeypatch.setattr(reducer, "__module__", "torch.multiprocessing.reductions")
        monkeypatch.setattr(reducer, "__qualname__", reducer.__name__)
        monkeypatch.setitem(pickling._REGISTERED, Pet, reducer)
        assert type(pickling.load(pickling.dump(Pet()))) is expected


def test_small_arrays_of_plain_numbers_have_a_short_pickle_and_others_that_of_numpy() -> None:
    writable = np.arange(6)
    read_only = np.arange(6)
    read_only.flags.writeable = False
    for array, arguments in (
        (writable, ((6,), "<i8", writable.tobytes())),
        (read_only, ((6,), "<i8", read_only.tobytes())),
        (np.ones((2, 3), "f4"), ((2, 3), "<f4", np.ones(6, "f4").tobytes())),
        (np.zeros(LARGE_BYTES - 1, "u1"), ((LARGE_BYTES - 1,), "|u1", bytes(LARGE_BYTES - 1))),
    ):
        assert pickling._reduce_array(array) == (pickling._array, arguments)
    for name, array in {
        "large": np.zeros(LARGE_BYTES, "u1"),
        "texts": np.array(["a"]),
        "with metadata": np.zeros(3, np.dtype("f8", metadata={"unit": "m"})),
        "Fortran order": np.asfortranarray(np.ones((2, 3))),
        "not contiguous": np.arange(10)[::2],
    }.items():
        assert pickling._reduce_array(array)[0] is not pickling._array, name


def test_arrays_arrive_writable_with_one_more_copy_only_of_read_only_ones() -> None:
    large = np.arange(float(LARGE_BYTES))
    for name, array in {
        "small": np.arange(6.0),
        "without a dimension": np.array(3.0),
        "texts": np.array(["a", "b"]),
        "objects": np.array([1, "two"], dtype=object),
        "small, in Fortran order": np.asfortranarray(np.ones((2, 3))),
        "small, not contiguous": np.arange(10)[::2],
        "large": large,
        "large, in Fortran order": np.asfortranarray(large.reshape(256, 256)),
        "large, not contiguous": large[::2],
    }.items():
        for is_writable in (True, False):
            sent = array.view()
            sent.flags.writeable = is_writable
            message = pickling.dump(sent)
            found = pickling.load(message)
            np.testing.assert_array_equal(found, array, name)
            assert found.flags.writeable, name
            assert found.flags.f_contiguous == array.flags.f_contiguous or not array.flags.forc, name
            if is_writable and array.flags.forc and message.buffers:
                assert np.shares_memory(np.frombuffer(message.buffers[0]), array), name
            assert sent.flags.writeable == is_writable, name
    of_bytes = np.frombuffer(bytes(range(8)), np.uint8)
    found = pickling.load(pickling.dump(of_bytes))
    found += 1
    assert list(of_bytes) == list(range(8))


def make_tensor_class() -> Any:
    """Return a class like torch's: its own state is in no `vars`."""

    class Tensor:
        __slots__ = ("__dict__", "said")
        __module__ = "torch"

        def __init__(self, **said: Any) -> None:
            self.said = said

        device = property(lambda self: SimpleNamespace(type=self.said.get("device", "cpu")))
        layout = property(lambda self: self.said.get("layout", "strided"))
        requires_grad = property(lambda self: self.said.get("requires_grad", False))
        is_quantized = property(lambda self: self.said.get("is_quantized", False))
        dtype = property(lambda self: "torch.float32")
        shape = property(lambda self: [1, 2])

        def is_conj(self) -> bool:
            return bool(self.said.get("conj"))

        def is_neg(self) -> bool:
            return bool(self.said.get("neg"))

        def is_contiguous(self) -> bool:
            return not self.said.get("scattered")

        def numel(self) -> int:
            return int(self.said.get("count", 2))

        def detach(self) -> Any:
            return self

        def reshape(self, *shape: int) -> Any:
            assert shape == (-1,)
            return self

        def view(self, kind: str) -> Any:
            assert kind == "uint8"
            return self

        def numpy(self) -> Any:
            return np.frombuffer(bytearray(struct.pack("<2f", 1.0, 2.0)), np.uint8)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return str, (f"as torch does in protocol {protocol}",)

    return Tensor


def test_tensors_of_plain_numbers_travel_as_buffers_and_others_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = make_tensor_class()
    torch: Any = ModuleType("torch")
    torch.Tensor, torch.strided, torch.uint8, torch.float32 = kind, "strided", "uint8", np.float32
    torch.frombuffer = lambda data, dtype: np.frombuffer(data, dtype)
    monkeypatch.setitem(sys.modules, "torch", torch)
    try:
        sent = pickling.load(pickling.dump([kind(), np.arange(3)]))
        np.testing.assert_array_equal(sent[0], np.array([[1.0, 2.0]], np.float32))
        named = kind()
        named.name = "weights"
        assert pickling.load(pickling.dump(named)) == "as torch does in protocol 5"
        for said in (
            {"device": "cuda"},
            {"layout": "sparse"},
            {"requires_grad": True},
            {"is_quantized": True},
            {"conj": True},
            {"neg": True},
            {"scattered": True},
            {"count": 0},
        ):
            assert pickling.load(pickling.dump(kind(**said))) == "as torch does in protocol 5", said
    finally:
        pickling._Pickler.dispatch_table.pop(kind, None)


# Answers.


class Refuses:
    """Refuses to be pickled, and has no text."""

    def __reduce__(self) -> Any:
        raise TypeError("not this one")

    def __str__(self) -> str:
        raise ValueError("no text")


class Own(Exception):
    """An exception whose class takes other arguments than it passes on."""

    def __init__(self, one: object, *, two: object) -> None:
        super().__init__(f"{one} and more")
        self.one, self.two = one, two


class MadeAnew(Exception):
    """An exception whose class has no `__init__` of its own."""

    def __new__(cls, one: int, two: int) -> MadeAnew:
        return super().__new__(cls, one + two)

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)


class NewOnly(Exception):
    """An exception that is made, and not initialized, in its own way."""

    def __new__(cls, one: int, two: int = 3) -> NewOnly:
        error = super().__new__(cls, one)
        error.two = two  # type: ignore[attr-defined]  # as programs add to exceptions
        return error


class Reduces(Exception):
    """An exception whose class says how it is pickled."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(one)
        self.way = two

    def __reduce__(self) -> Any:
        return Reduces, (self.args[0], "reduced")


class ReducesByProtocol(Exception):
    """An exception whose class says so for each protocol."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(one)
        self.way = two

    def __reduce_ex__(self, protocol: Any) -> Any:
        return ReducesByProtocol, (self.args[0], f"protocol {protocol}")


def raised_by(error: BaseException) -> BaseException:
    """Return what a client raises for an error of a server."""
    try:
        raise error
    except BaseException as found:
        message = encode_error(found)
    with pytest.raises(Exception) as caught:  # any
        decode_answer(message, "tag", "method")
    return caught.value


def test_exceptions_arrive_with_what_their_classes_need() -> None:
    own: Any = raised_by(Own("one", two=2))
    assert (type(own), own.args, own.one, own.two) == (Own, ("one and more",), "one", 2)
    partly: Any = raised_by(Own("one", two=Refuses()))
    assert (partly.args, vars(partly)) == (("one and more",), {"one": "one"})
    assert raised_by(MadeAnew(1, 2)).args == (1, 2)
    new: Any = raised_by(NewOnly(1, 2))
    assert (new.args, new.two) == ((1, 2), 2)
    reduced: Any = raised_by(Reduces("one", "first"))
    assert (reduced.args, reduced.way) == (("one",), "reduced")
    by_protocol: Any = raised_by(ReducesByProtocol("one", "first"))
    assert (by_protocol.args, by_protocol.way) == (("one",), "protocol 5")
    missing: Any = raised_by(FileNotFoundError(2, "No such file", "name"))
    assert (missing.errno, missing.filename) == (2, "name")
    cause = raised_by(ValueError("plain")).__cause__
    assert isinstance(cause, RemoteTraceback)
    assert cause.args == (cause.text,)
    assert str(cause) == f"\n{cause.text}"
    assert "raise error" in cause.text
    assert "ValueError: plain" in cause.text


def test_what_cannot_be_raised_in_a_client_is_described_there() -> None:
    for error, line in (
        (KeyboardInterrupt("stop"), "KeyboardInterrupt: stop"),
        (SystemExit(3), "SystemExit: 3"),
        (Unpicklable("text"), f"{__name__}.Unpicklable: text"),
        (Silent(), f"{__name__}.Silent: (its text cannot be made)"),
    ):
        found: Any = raised_by(error)
        assert type(found) is RemoteCallError
        assert f"method() of 'tag' raised {line}, which cannot be raised here" in str(found)
        assert (found.tag, found.method) == ("tag", "method")


class Unpicklable(Exception):
    """Says how it is pickled, and cannot be."""

    def __reduce__(self) -> Any:
        raise TypeError("not this one")


class Silent(Exception):
    """Has no text, and cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("not this one")

    def __str__(self) -> str:
        raise ValueError("no text")


def break_when_loaded() -> Any:
    """Stand for the class of a result that a client does not have."""
    raise ImportError("no such class")


class BreaksWhenLoaded(Exception):
    """Can be sent, but not received."""

    def __reduce__(self) -> Any:
        return break_when_loaded, ()


def test_a_result_that_cannot_be_sent_or_received_is_an_error_that_names_it() -> None:
    assert decode_answer(encode_result({"a": 1}, "tag", "method"), "tag", "method") == {"a": 1}
    refused = rf"method\(\) of 'tag' returned a {__name__}.Refuses, which cannot be pickled"
    with pytest.raises(RemoteCallError, match=refused) as caught:
        decode_answer(encode_result(Refuses(), "tag", "method"), "tag", "method")
    assert (caught.value.tag, caught.value.method) == ("tag", "method")
    with pytest.raises(RemoteCallError, match="cannot be unpickled here: no such class") as caught:
        decode_answer(encode_result(BreaksWhenLoaded(), "tag", "method"), "tag", "method")
    assert (caught.value.tag, caught.value.method) == ("tag", "method")
    with pytest.raises(RemoteCallError, match="BreaksWhenLoaded: text, which cannot be raised here"):
        decode_answer(encode_error(BreaksWhenLoaded("text")), "tag", "method")


# What a new process gets.


def pickler(name: str, refuses: bool = False) -> Any:
    """Return a class of picklers whose pickles are its name, and which may refuse."""

    class Named:
        __module__ = f"some._{name}"

        def __init__(self, file: Any) -> None:
            self.file = file

        def dump(self, thing: object) -> None:
            if refuses:
                raise TypeError(f"{name} refuses")
            self.file.write(name.encode())

    return Named


def test_a_constructor_is_pickled_by_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def dumped(first_refuses: bool, second_refuses: bool) -> bytes:
        picklers = [pickler("first", first_refuses), pickler("second", second_refuses)]
        monkeypatch.setattr(protocol, "_picklers", lambda: picklers)
        return protocol.dump_for_server(1, "it")

    assert dumped(False, False) == b"first"
    assert dumped(True, False) == b"second"
    with pytest.raises(
        InvalidArgumentError, match=r"it cannot be sent .* \(first: first refuses; second: second refuses\)"
    ):
        dumped(True, True)


class CutAtOnce:
    """A pickler in Python that reduces all objects in its own way, as cloudpickle reduces some."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def reducer_override(self, thing: object) -> object:
        return f"reduced {thing}"

    def dump(self, thing: object) -> None:
        self.file.write(str(self.reducer_override(thing)).encode())


def test_a_pickler_reduces_as_before_what_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_picklers", lambda: [CutAtOnce])
    assert protocol.dump_for_server(1, "it") == b"reduced 1"


def test_a_constructor_with_a_file_of_this_process_in_it_is_refused_unless_its_class_says_how_it_is_pickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = Pipe()
    one, other = socket.socketpair()
    with ours, theirs, one, other:
        for thing in (ours, one):
            kind = type(thing)
            constructor = functools.partial(print, [thing])
            refused = (
                rf"^it cannot be sent to a model server: a {kind.__name__} is a file descriptor of this process .*s$"
            )
            with pytest.raises(InvalidArgumentError, match=refused):
                protocol.dump_for_server(constructor, "it")
            monkeypatch.setitem(copyreg.dispatch_table, kind, lambda thing: (str, ("as registered",)))
            assert pickle.loads(protocol.dump_for_server(constructor, "it")).args == (["as registered"],)


def test_cloudpickle_comes_first_for_a_main_module_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("cloudpickle")
    package.CloudPickler = pickler("cloudpickle")
    of_beam: Any = ModuleType("apache_beam.internal.cloudpickle")
    of_beam.CloudPickler = pickler("of Beam")
    monkeypatch.setitem(sys.modules, "cloudpickle", package)
    monkeypatch.setitem(sys.modules, of_beam.__name__, of_beam)
    for installed, beam, importable, expected in (
        (True, True, True, [pickle.Pickler, package.CloudPickler]),
        (True, True, False, [package.CloudPickler, pickle.Pickler]),
        (False, True, True, [pickle.Pickler, of_beam.CloudPickler]),
        (False, True, False, [of_beam.CloudPickler, pickle.Pickler]),
        (False, False, False, [pickle.Pickler]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", lambda name, installed=installed: name if installed else None)
            patched.setattr(protocol, "is_main_importable", lambda importable=importable: importable)
            if not beam:
                patched.delitem(sys.modules, of_beam.__name__)
            assert protocol._picklers() == expected, (installed, beam, importable)


# Memory for what arrives.


@pytest.fixture
def no_slabs() -> Iterator[None]:
    """Begin and end without slabs."""
    drop_spare_slabs()
    kept = receive_buffers._slabs[:]
    receive_buffers._slabs.clear()
    yield
    receive_buffers._slabs[:] = kept


def owners(views: list[memoryview]) -> list[int]:
    """Return for each view the number of the memory that it is in."""
    found = list(dict.fromkeys(id(view.obj) for view in views))
    return [found.index(id(view.obj)) for view in views]


@pytest.mark.usefixtures("no_slabs")
def test_neighbouring_buffers_share_a_slab_up_to_its_size() -> None:
    for sizes, expected in (
        ([SLAB_BYTES - ALIGNMENT, ALIGNMENT], [0, 0]),
        ([SLAB_BYTES - ALIGNMENT, ALIGNMENT + 1], [0, 1]),
        # The second one begins at the next multiple of the alignment.
        ([SLAB_BYTES - 2 * ALIGNMENT + 1, ALIGNMENT + 1], [0, 1]),
        ([2 * SLAB_BYTES, 1, 1], [0, 1, 2]),
        ([1 << 20, 2 * SLAB_BYTES, 1 << 20, 1 << 20], [0, 1, 2, 2]),
    ):
        views = receive_memory(sizes)
        assert owners(views) == expected, sizes
        assert [view.nbytes for view in views] == sizes
        addresses = [np.frombuffer(view, np.uint8).ctypes.data for view in views]
        assert expected[0] != expected[1] or addresses[1] - addresses[0] == -(-sizes[0] // ALIGNMENT) * ALIGNMENT
    assert receive_memory([]) == []


@pytest.mark.usefixtures("no_slabs")
def test_a_group_is_in_a_slab_once_it_is_large() -> None:
    [below] = receive_memory([SMALLEST_SLAB_BYTES - ALIGNMENT])
    assert isinstance(below.obj, bytearray)
    assert receive_buffers._slabs == []
    [at] = receive_memory([SMALLEST_SLAB_BYTES])
    assert not isinstance(at.obj, bytearray)
    assert [slab.size for slab in receive_buffers._slabs] == [SLAB_BYTES]
    # The whole of a large one is in pages of one mapping.
    [large] = receive_memory([SLAB_BYTES + 1])
    assert [slab.size for slab in receive_buffers._slabs] == [SLAB_BYTES, 2 * SLAB_BYTES]
    del at, large


@pytest.mark.usefixtures("no_slabs")
def test_a_slab_is_used_again_if_it_is_free_and_of_the_size_that_is_needed() -> None:
    slabs = receive_buffers._slabs
    first = receive_memory([SLAB_BYTES])
    [one] = slabs
    other = receive_memory([2 * SLAB_BYTES])
    assert [slab.is_spare() for slab in slabs] == [False, False]
    del first
    assert [slab.is_spare() for slab in slabs] == [True, False]
    # Of another size.
    third = receive_memory([2 * SLAB_BYTES])
    assert [slab.size // SLAB_BYTES for slab in slabs] == [1, 2, 2]
    again = receive_memory([SLAB_BYTES])
    assert len(slabs) == 3
    assert slabs[-1] is one, "the one used last"
    assert not one.is_spare()
    del other, third, again
    drop_spare_slabs()
    assert slabs == []


@pytest.mark.usefixtures("no_slabs")
def test_free_slabs_go_only_as_far_as_needed_to_keep_to_the_limit() -> None:
    slabs = receive_buffers._slabs
    count = SPARE_BYTES // SLAB_BYTES
    views = receive_memory([SLAB_BYTES] * (count - 2))
    del views
    # Exactly as much as is kept.
    kept = receive_memory([2 * SLAB_BYTES])
    assert [slab.size // SLAB_BYTES for slab in slabs] == [1] * (count - 2) + [2]
    # One more: a free one goes.
    more = receive_memory([3 * SLAB_BYTES])
    assert [slab.size // SLAB_BYTES for slab in slabs] == [1] * (count - 5) + [2, 3]
    # What is lent stays, and a slab beyond the limit is not kept.
    beyond = receive_memory([SPARE_BYTES])
    assert [slab.size // SLAB_BYTES for slab in slabs] == [2, 3]
    del kept, more, beyond


@pytest.mark.usefixtures("no_slabs")
def test_a_slab_that_another_thread_has_taken_is_not_taken_twice_and_a_child_has_none() -> None:
    views = receive_memory([SLAB_BYTES])
    del views
    assert in_child(lambda: len(receive_buffers._slabs)) == 0
    [slab] = receive_buffers._slabs
    assert receive_buffers._take(slab)
    assert not receive_buffers._take(slab)


def test_a_slab_asks_for_huge_pages_and_is_given_back_where_the_kernel_allows_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    refused: list[int] = []

    class Mapping(mmap.mmap):
        def madvise(self, option: int, *_: Any) -> None:
            asked.append(option)
            if option in refused:
                raise OSError(errno.EINVAL, "no such advice")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    ways: tuple[tuple[list[int], list[int]], ...] = (
        ([], [mmap.MADV_FREE]),
        ([mmap.MADV_HUGEPAGE], [mmap.MADV_FREE]),
        ([mmap.MADV_FREE], []),
    )
    for refused_now, at_end in ways:
        refused[:] = refused_now
        asked.clear()
        slab = receive_buffers._Slab(SLAB_BYTES)
        assert asked == [mmap.MADV_HUGEPAGE, mmap.MADV_FREE]
        assert slab.is_spare()
        asked.clear()
        memory = slab.lend()
        assert (memory.nbytes, memory.format, slab.is_spare()) == (SLAB_BYTES, "B", False)
        assert asked == []
        del memory
        assert asked == at_end
        assert slab.is_spare()

    def no_memory(*_: Any, **options: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", no_memory)
    with pytest.raises(MemoryError, match="no memory for a payload of 4 MB"):
        receive_buffers._Slab(SLAB_BYTES)


# Shared buffers.


@needs_sealed_files
def test_a_shared_buffer_is_seen_by_both_sides_and_given_back_by_either() -> None:
    ours, fd = create_shared_buffer()
    theirs = SharedBuffer(fd)
    os.close(fd)
    assert [slot.nbytes for slot in ours.slots] == [SLOT_BYTES] * shared_buffer.SLOTS
    for number, slot in enumerate(ours.slots):
        slot[:2] = bytes([number + 1]) * 2
    assert [bytes(slot[:3]) for slot in theirs.slots] == [bytes([number + 1] * 2 + [0]) for number in range(4)]
    theirs.give_back()
    assert [bytes(slot[:2]) for slot in ours.slots] == [bytes(2)] * 4


@needs_sealed_files
def test_a_process_has_as_many_shared_buffers_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    monkeypatch.setattr(shared_buffer, "_shared_buffers", held)
    mb = SHARED_BUFFER_BYTES / 2**20
    for limit, count in (("0", 0), (str(mb), 1), (str(2.5 * mb), 2), ("junk", 64), (None, 64), ("-1", 0)):
        if limit is None:
            monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(LIMIT_VARIABLE, limit)
        held[:] = [None] * max(0, count - 1)
        if count:
            shared_buffer._check_limit()
        held[:] = [None] * count
        with pytest.raises(OSError, match=f"^{count} shared buffers are in use"):
            shared_buffer._check_limit()
        with pytest.raises(OSError, match="in use"):
            create_shared_buffer()


@needs_sealed_files
def test_a_shared_buffer_is_made_only_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    available = [LEAST_AVAILABLE_BYTES - 1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available[0]))
    with pytest.raises(OSError, match="256 MB of memory are available, less than 256"):
        create_shared_buffer()
    available[0] += 1
    _, fd = create_shared_buffer()
    os.close(fd)
    # What is made is there: writing to it cannot fail later.
    allocated: list[Any] = []

    def allocate(fd: int, start: int, size: int) -> None:
        allocated.append((start, size))
        os.ftruncate(fd, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    _, fd = create_shared_buffer()
    os.close(fd)
    assert allocated == [(0, SHARED_BUFFER_BYTES)]


@needs_sealed_files
def test_only_a_file_of_the_right_size_that_keeps_it_is_a_shared_buffer() -> None:
    shrink, grow, seal = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL
    for size, seals, fits in (
        (SHARED_BUFFER_BYTES, shrink | grow | seal, True),
        (SHARED_BUFFER_BYTES, shrink | grow, False),
        (SHARED_BUFFER_BYTES, shrink | seal, False),
        (SHARED_BUFFER_BYTES, grow | seal, False),
        (SHARED_BUFFER_BYTES, 0, False),
        (SHARED_BUFFER_BYTES - 1, shrink | grow | seal, False),
        (SHARED_BUFFER_BYTES + 1, shrink | grow | seal, False),
    ):
        fd = os.memfd_create("mpmm-buffer", os.MFD_ALLOW_SEALING)
        os.truncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        try:
            SharedBuffer(fd)
            accepted = True
        except OSError:
            accepted = False
        finally:
            os.close(fd)
        assert accepted is fits, (size, seals)


# Sockets.


def test_an_address_is_the_path_itself_as_long_as_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    folder = "/" + "f" * (sockets.LONGEST_ADDRESS_BYTES - 10)
    with sockets._short_address(folder, "s" * 8) as address:
        assert address == f"{folder}/ssssssss"
    long = tmp_path / ("f" * 200)
    long.mkdir()
    (long / "name").touch()
    for has_proc in (True, False):
        monkeypatch.setattr(sockets, "_HAS_PROC", has_proc)
        with sockets._short_address(long, "name") as address:
            assert os.path.samefile(address, long / "name")
            assert len(address) < sockets.LONGEST_ADDRESS_BYTES
        assert not os.path.lexists(address)
        assert not os.path.lexists(os.path.dirname(os.path.dirname(address))) or has_proc
    assert not open_descriptors() - before
    # Bytes count, not characters.
    (umlauts := tmp_path / ("ä" * 60)).mkdir()
    monkeypatch.setattr(sockets, "_HAS_PROC", True)
    with sockets._short_address(umlauts, "name") as address:
        assert address.startswith("/proc/self/fd/")


def test_time_limits_of_a_connection_are_for_both_directions_and_fractions_of_a_second() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sockets.set_timeouts(ours, 2.25)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            assert struct.unpack("@ll", ours.getsockopt(socket.SOL_SOCKET, option, 16)) in ((2, 250_000), (2, 252_000))


def test_what_arrives_in_parts_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Peer:
        def __init__(self, *parts: bytes) -> None:
            self.parts = list(parts)

        def recv(self, count: int) -> bytes:
            asked.append(count)
            return self.parts.pop(0) if self.parts else b""

    peer: Any = Peer(b"ab", b"c", b"de")
    assert sockets._receive(peer, 5) == b"abcde"
    assert asked == [5, 3, 2]
    asked.clear()
    peer = Peer(b"ab", b"c", b"de")
    found: list[bytes] = []

    def collect() -> Generator[None, None, None]:
        found.append((yield from sockets._receive_in_steps(peer, 5)))

    looks = len(list(collect()))
    assert found == [b"abcde"]
    assert (asked, looks) == ([5, 3, 2], 3)
    for receive in (sockets._receive, lambda peer, count: list(sockets._receive_in_steps(peer, count))):
        gone: Any = Peer(b"ab")
        with pytest.raises(EOFError):
            receive(gone, 5)


def test_a_message_is_read_in_steps_whatever_its_size() -> None:
    large = os.urandom(3 * sockets.MOST_AT_ONCE_BYTES + 1)
    found: list[bytes] = []
    ours, theirs = multiprocessing.Pipe()

    def send() -> None:
        for message in (b"", b"small", large):
            theirs.send_bytes(message)
        # As a message of more than 2 GiB begins.
        os.write(theirs.fileno(), struct.pack("!iQ", -1, 5) + b"after")

    def collect() -> Generator[None, None, None]:
        found.append((yield from sockets.message_in_steps(ours)))

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(4):
        for _ in collect():
            assert ours.poll(DEADLINE_S), "there is more to read"
    sender.join()
    assert found == [b"", b"small", large, b"after"]
    theirs.close()
    with pytest.raises(EOFError):
        list(sockets.message_in_steps(ours))
    ours.close()


def test_who_is_at_the_other_end_is_known_as_far_as_the_kernel_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert sockets.peer_pid(ours.fileno()) == os.getpid()
        assert sockets.peer_uid(ours.fileno()) == os.getuid()
        monkeypatch.setattr(sockets, "_peer_credentials", lambda fd: (0, 5, 5))
        assert sockets.peer_pid(ours.fileno()) is None, "in another pid namespace"
        assert sockets.peer_uid(ours.fileno()) == 5
        monkeypatch.undo()
        monkeypatch.delattr(socket, "SO_PEERCRED")
        assert sockets.peer_pid(ours.fileno()) is None
        assert sockets.peer_uid(ours.fileno()) is None


KEY = b"k" * 32


def shake_hands(
    monkeypatch: pytest.MonkeyPatch, clients_key: bytes = KEY, server_version: int = PROTOCOL_VERSION
) -> tuple[Any, Any]:
    """Return what comes of a handshake for the client and for the server, None if it succeeds."""
    ours, theirs = socket.socketpair()
    version_struct = struct.Struct(">H")

    def versions(version: int) -> bytes:
        is_server = threading.current_thread() is not threading.main_thread()
        return version_struct.pack(server_version if is_server else version)

    monkeypatch.setattr(
        sockets, "_VERSION", SimpleNamespace(pack=versions, size=2, unpack_from=version_struct.unpack_from)
    )

    def serve() -> None:
        with Connection(theirs.detach()) as connection:
            sockets.authenticate_client(connection, KEY)

    serving, outcome = in_thread(serve)
    client: Any = None
    try:
        sockets._prove_to_server(ours, clients_key)
    except Exception as error:
        client = error
    ours.close()
    serving.join(DEADLINE_S)
    return client, outcome[0]


def test_two_sides_that_know_the_key_and_speak_the_same_version_accept_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shake_hands(monkeypatch) == (None, None)
    client, server = shake_hands(monkeypatch, b"another" * 4)
    assert (type(client), str(client)) == (AuthenticationError, "the server does not know the key")
    assert isinstance(server, EOFError)
    client, server = shake_hands(monkeypatch, server_version=PROTOCOL_VERSION + 1)
    assert isinstance(client, AuthenticationError)
    assert str(client).startswith(f"the server speaks version {PROTOCOL_VERSION + 1} of the protocol, this process ver")


def test_a_client_that_does_not_know_the_key_is_refused_whatever_it_repeats() -> None:
    """Also one that sends back what the server itself has proved."""
    for proves in (lambda proof: bytes(32), lambda proof: proof):
        ours, theirs = socket.socketpair()

        def serve(theirs: socket.socket = theirs) -> None:
            with Connection(theirs.detach()) as connection:
                sockets.authenticate_client(connection, KEY)

        serving, outcome = in_thread(serve)
        with ours:
            ours.sendall(sockets._nonce())
            ours.sendall(proves(sockets._receive(ours, 64)[32:]))
            serving.join(DEADLINE_S)
        assert [(type(error), str(error)) for error in outcome] == [
            (AuthenticationError, "the client does not know the key")
        ]


def test_a_handshake_of_another_user_is_refused_before_anything_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, Connection(theirs.detach()) as connection:
        for uid, refused in ((os.getuid() + 1, True), (None, False), (os.getuid(), False)):
            monkeypatch.setattr(sockets, "peer_uid", lambda fd, uid=uid: uid)
            steps = sockets.handshake(connection, KEY)
            if refused:
                with pytest.raises(AuthenticationError, match=f"a process of uid {uid} tried to connect"):
                    next(steps)
            else:
                next(steps)


def test_nonces_begin_with_the_version_and_are_never_the_same() -> None:
    nonces = [sockets._nonce() for _ in range(3)]
    assert {(len(nonce), nonce[:2]) for nonce in nonces} == {(32, PROTOCOL_VERSION.to_bytes(2, "big"))}
    assert len({nonce[2:] for nonce in nonces}) == 3


def test_a_listener_that_cannot_be_had_leaves_no_descriptor(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match=r"[Nn]o such file") as error:
        sockets.listen(tmp_path / "nowhere", "s")
    assert not open_descriptors() - before
    assert error.tb is not None
    with contextlib.closing(sockets.listen(tmp_path, "s")) as listener:
        assert not listener.getblocking()
        assert sockets.accept(listener) is None
        with pytest.raises(OSError, match="in use"):
            sockets.listen(tmp_path, "s")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            assert sockets.pid_at(tmp_path, "s", 1.0) == os.getpid()
            connection = sockets.accept(listener)
            assert connection is not None
            with connection:
                assert os.get_blocking(connection.fileno())
                fds = [listener.fileno(), connection.fileno()]
                assert in_child(lambda: [os.path.exists(f"/proc/self/fd/{fd}") for fd in fds]) == [False, False]
    with pytest.raises(ConnectionRefusedError):
        sockets.pid_at(tmp_path, "s", 1.0)

    def abort() -> Any:
        raise ConnectionAbortedError

    aborted: Any = SimpleNamespace(accept=abort)
    assert sockets.accept(aborted) is None


def test_sockets_have_no_time_limit_whatever_a_program_sets_for_its_own() -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5.0)
    try:
        with ForkSafeSocket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            assert one.gettimeout() is None
        ours, theirs = sockets.pair()
        with ours, theirs:
            assert (ours.gettimeout(), theirs.gettimeout()) == (None, None)
            fds = [ours.fileno(), theirs.fileno()]
            assert in_child(lambda: [os.path.exists(f"/proc/self/fd/{fd}") for fd in fds]) == [False, False]
    finally:
        socket.setdefaulttimeout(before)


def test_a_message_may_have_no_buffers() -> None:
    assert Message(b"head").buffers == ()


# Channels.


SMALL_SLOT_BYTES = LARGE_BYTES
ANSWER = Message(b"answer")
SENT_ANSWER = struct.pack("<II", 6, 0) + b"answer"


class Line(ForkSafeSocket):
    """A socket that notes what is sent and how much is received at a time."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self.sent: list[bytes] = []
        self.flags: set[int] = set()

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.sent.append(bytes(data))
        self.flags.add(flags)
        super().sendall(data, flags)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Two ends of a connection that note what they send, in slots of a size at which a test is quick."""
    monkeypatch.setattr(channel, "SLOT_BYTES", SMALL_SLOT_BYTES)
    monkeypatch.setattr(shared_buffer, "SLOT_BYTES", SMALL_SLOT_BYTES)
    monkeypatch.setattr(shared_buffer, "SHARED_BUFFER_BYTES", 4 * SMALL_SLOT_BYTES)
    ours, theirs = (Channel(Line(end.detach())) for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def exchange(sender: Channel, receiver: Channel, message: Message) -> Message:
    """Send a message from one end to the other, and an answer back; return the message, with copies of its parts."""
    sending, outcome = in_thread(lambda: sender.send(message))
    head, buffers = receiver.receive()
    found = Message(bytes(head), [memoryview(bytes(buffer)) for buffer in buffers])
    sending.join(DEADLINE_S)
    assert outcome == [None]
    receiver.send(ANSWER)
    assert bytes(sender.receive().head) == ANSWER.head
    return found


def test_a_small_message_is_sent_at_once_and_a_large_one_as_a_bulk(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for size, marks in ((0, []), (LARGE_BYTES - 1, []), (LARGE_BYTES, ["o", "f"]), (LARGE_BYTES + 1, ["f", "f"])):
        ours._socket.sent.clear()
        head = bytes([size % 251]) * size
        assert exchange(ours, theirs, Message(head)) == (head, [])
        frame, *rest = ours._socket.sent
        assert struct.unpack_from("<II", frame) == ((size, 0) if size < LARGE_BYTES else (0, 1))
        # The offer of a shared buffer goes with a descriptor.
        assert [mark.decode() for mark in rest] == [mark for mark in marks if mark != "o"], size
    assert ours._socket.flags == {NO_SIGNAL}
    assert theirs._socket.flags == {NO_SIGNAL}
    buffers = [memoryview(b"a" * 5), memoryview(b""), memoryview(b"b" * 7)]
    assert exchange(ours, theirs, Message(b"head", buffers)) == (b"head", buffers)
    large = b"h" * LARGE_BYTES
    assert exchange(ours, theirs, Message(large, buffers)) == (large, buffers)


def test_memory_for_frames_grows_to_that_of_a_small_message_and_no_further(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    first = theirs._kept
    for size in (10, len(first) - 8):
        exchange(ours, theirs, Message(bytes(size)))
        assert theirs._kept is first
    exchange(ours, theirs, Message(bytes(len(first) - 7)))
    assert len(theirs._kept) == len(first) + 1
    exchange(ours, theirs, Message(bytes(LARGE_BYTES - 1)))
    assert len(theirs._kept) == LARGE_BYTES + 7
    exchange(ours, theirs, Message(b"x", [memoryview(b"x")] * (LARGE_BYTES // 8)))
    assert len(theirs._kept) == LARGE_BYTES + 7


@needs_sealed_files
def test_slots_are_used_in_turn_and_given_back_only_if_they_are_needed_again(
    pair: tuple[Any, Any],
) -> None:
    ours, theirs = pair
    for slots, emptied in ((1, 0), (4, 0), (5, 1), (9, 5)):
        for size in (slots * SMALL_SLOT_BYTES - 1, slots * SMALL_SLOT_BYTES):
            for one, other in ((ours, theirs), (theirs, ours)):
                one._socket.sent.clear()
                other._socket.sent.clear()
                payload = np.arange(size, dtype=np.uint8).data
                _, [found] = exchange(one, other, Message(b"head", [payload]))
                assert found == payload
                assert b"".join(one._socket.sent[1:]) == b"f" * slots
                # The first one has no shared buffer yet.
                have = [b"l", b"h"] if size == SMALL_SLOT_BYTES - 1 and one is ours else [b"h"]
                assert other._socket.sent == [*have, *[b"e"] * emptied, b"r", SENT_ANSWER], (slots, size)


@needs_sealed_files
def test_a_side_without_shared_buffers_is_offered_one_once_and_sent_everything_through_the_socket(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    offers: list[bool] = []

    def create_and_note() -> Any:
        offers.append(True)
        return create_shared_buffer()

    def refuse(fd: int) -> Any:
        raise OSError("no memory")

    before = open_descriptors()
    monkeypatch.setattr(channel, "create_shared_buffer", create_and_note)
    monkeypatch.setattr(channel, "SharedBuffer", refuse)
    payload = np.arange(LARGE_BYTES, dtype=np.uint8).data
    for _ in range(2):
        ours._socket.sent.clear()
        theirs._socket.sent.clear()
        assert exchange(ours, theirs, Message(b"head", [payload, payload]))[1] == [payload, payload]
        assert ours._socket.sent[1:] == [b"p", bytes(payload), bytes(payload)]
    assert (len(offers), theirs._socket.sent) == (1, [b"l", SENT_ANSWER])
    assert ours._shared_buffer is None
    assert not open_descriptors() - before
    # A side that can make none does not offer it, and tries again.
    monkeypatch.setattr(channel, "create_shared_buffer", lambda: refuse(0))
    assert exchange(theirs, ours, Message(b"head", [payload]))[1] == [payload]
    assert not theirs._refused


@needs_sealed_files
def test_an_idle_side_gives_its_memory_back_and_the_other_one_makes_a_new_one(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    monkeypatch.setattr(channel, "IDLE_MS", 0)
    dropped: list[bool] = []
    monkeypatch.setattr(channel, "drop_spare_slabs", lambda: dropped.append(True))
    ours.give_back_when_idle()
    assert dropped == []
    payload = np.arange(LARGE_BYTES, dtype=np.uint8).data
    exchange(ours, theirs, Message(b"head", [payload]))
    # Something arrives.
    ours.send(Message(b"more"))
    theirs.give_back_when_idle()
    assert (dropped, theirs._shared_buffer is None) == ([], False)
    assert bytes(theirs.receive().head) == b"more"
    theirs.give_back_when_idle()
    assert (dropped, theirs._shared_buffer) == ([True], None)
    assert bytes(ours._shared_buffer.slots[0][:2]) == bytes(2)
    kept = ours._shared_buffer
    assert exchange(ours, theirs, Message(b"head", [payload]))[1] == [payload]
    assert ours._shared_buffer is not kept
    assert theirs._shared_buffer is not None


@needs_sealed_files
def test_a_side_whose_payload_is_being_copied_is_not_idle(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    monkeypatch.setattr(channel, "IDLE_MS", 0)
    payload = np.arange(LARGE_BYTES, dtype=np.uint8).data
    sending, _ = in_thread(lambda: ours.send(Message(b"head", [payload])))
    theirs.receive()
    sending.join(DEADLINE_S)
    # The last word about the copy has arrived.
    assert ours._being_read
    assert (ours.is_readable(0), ours._being_read) == (False, False)
    ours._being_read = True
    assert (ours.is_readable(0), ours._being_read) == (False, True)
    ours.give_back_when_idle()
    assert ours._shared_buffer is not None
    theirs._socket.sendall(channel.READ)
    theirs.send(Message(b"answer"))
    assert ours.is_readable(0)
    assert not ours._being_read
    assert bytes(ours.receive().head) == b"answer"
    ours._being_read = True
    theirs._socket.sendall(channel.READ)
    theirs.send(Message(b"answer"))
    assert bytes(ours.receive().head) == b"answer"
    assert not ours._being_read


def test_a_side_that_hangs_up_is_noticed_at_each_step(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    theirs._socket.sendall(channel.FILLED)
    theirs._socket.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        # It says that a slot is full, and there is no shared buffer.
        ours._receive_bulk([memoryview(bytearray(5))])
    assert ours._byte() == channel.FILLED
    for step in (ours._byte, ours._marks, ours.receive, lambda: ours._fill(memoryview(bytearray(5)), 0, 5)):
        with pytest.raises(EOFError):
            step()
    assert ours.is_readable(0), "the end is something to read"


def test_a_channel_takes_over_a_connection_and_is_closed_in_children() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours.detach())
    taken = Channel(connection)
    assert connection.closed
    fd = taken.fileno()
    assert os.fstat(fd)
    assert in_child(lambda: os.path.exists(f"/proc/self/fd/{fd}")) is False
    taken.close()
    assert (taken.fileno(), theirs.recv(1)) == (-1, b"")
    taken.close()
    theirs.close()
    # One that was never made, as where no descriptor was to be had, has nothing to close.
    Channel.__new__(Channel).__del__()
