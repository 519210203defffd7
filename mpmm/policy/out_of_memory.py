"""Running out of memory although admission said that it fits: how to tell, and what to assume afterwards.

The libraries that run out are not imported here, and need not be importable: their exceptions are recognized by the
names of their classes and modules, or by their messages, as their users report them: `torch.cuda.OutOfMemoryError:
CUDA out of memory. Tried to allocate …`, `jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory …`,
`onnxruntime…RuntimeException: … BFCArena::AllocateRawInternal … Failed to allocate memory for requested buffer …`.
"""

from __future__ import annotations

import math
import re

from mpmm.errors import MpmmError, RemoteCallError, ServerStartError

__all__ = ["MORE_MB", "bound_mb", "is_out_of_memory", "raised_estimate_mb"]

# By how much a model's estimate grows if it has turned out to be too low and nothing can be measured.
GROWTH = 1.25
# How much more than the free memory a model that ran out needs at least; memory sources resolve no less than this.
MORE_MB = 1.0
# (package, class): torch.OutOfMemoryError was torch.cuda.OutOfMemoryError before 2.5.
_CLASSES = {("torch", "OutOfMemoryError"), ("tensorflow", "ResourceExhaustedError"), ("cupy", "OutOfMemoryError")}
# The meaning of these depends on a status; only this one stands for memory.
_STATUS_CLASSES = {"XlaRuntimeError", "JaxRuntimeError"}
_STATUS = "RESOURCE_EXHAUSTED"
# Compared in lower case. RESOURCE_EXHAUSTED alone is not among them: quotas of web services say that, too.
_TEXTS = (
    "cuda out of memory",
    "hip out of memory",
    "xpu out of memory",
    "mps backend out of memory",
    "cuda error: out of memory",
    "hip error: out of memory",
    "cuda failure 2: out of memory",
    "cuda_error_out_of_memory",
    "cudaerrormemoryallocation",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "resource_exhausted: out of memory",
    "resource exhausted: out of memory",
    "oom when allocating tensor",
    "failed to allocate memory for requested buffer",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "std::bad_alloc",
)
# The last line of a traceback from another process, if it was one of these.
_LAST_LINE = re.compile(r"^(?:\w+\.)*(?:MemoryError|OutOfMemoryError|ResourceExhaustedError)(?::|$)", re.MULTILINE)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory, of a device or of the host, has run out.

    It also does if the exception from which it was raised does. mpmm's own errors do not, although some are
    MemoryErrors (a model that is too large has taken nothing), except those that report an error of another process.
    """
    if isinstance(error, ServerStartError | RemoteCallError):
        return _says_so(error) or _LAST_LINE.search(str(error)) is not None
    if isinstance(error, MpmmError):
        return False
    if isinstance(error, MemoryError) or _is_of_known_class(error) or _says_so(error):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def raised_estimate_mb(need_mb: float, limit_mb: float) -> float:
    """Return a new estimate for a model that needs more than `need_mb`: more, but not so much that it never fits."""
    return max(need_mb, min(need_mb * GROWTH, limit_mb))


def bound_mb(free_mb: float, limit_mb: float) -> float:
    """Return the bound on a model that ran out of memory with `free_mb` free: it needs more than this.

    The bound is never so high that the model could not be admitted where it can get `limit_mb` at best: it is not
    certain why a loader ran out (it may have been host memory, or another program's doing), so the model is not refused
    for that. 0, no bound, if neither figure tells anything.
    """
    room_mb = math.floor(limit_mb) - MORE_MB if math.isfinite(limit_mb) else free_mb
    bound = min(free_mb, room_mb)
    return bound if bound > 0 else 0.0


def _is_of_known_class(error: BaseException) -> bool:
    for cls in type(error).__mro__:
        if (cls.__module__.partition(".")[0], cls.__name__) in _CLASSES:
            return True
        if cls.__name__ in _STATUS_CLASSES and _STATUS in str(error):
            return True
    return False


def _says_so(error: BaseException) -> bool:
    text = str(error).lower()
    return any(known in text for known in _TEXTS)
