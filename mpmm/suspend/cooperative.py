"""Suspension by the object itself: `sleep()` gives up its device memory, `wake_up()` takes it again.

These are vLLM's names. Both are called without arguments, `wake_up` only after `sleep` has returned, and neither while
the copy is in use. Wrap an engine whose methods have other names in a class that has these two:

    vLLM:    class Engine:                                   SGLang:  class Engine:
                 def __init__(self):                                      def __init__(self):
                     self.llm = LLM(…, enable_sleep_mode=True)                self.engine = sglang.Engine(…)
                 def sleep(self):                                         def sleep(self):
                     self.llm.sleep(level=1)                                  self.engine.release_memory_occupation()
                 def wake_up(self):                                       def wake_up(self):
                     self.llm.wake_up()                                       self.engine.resume_memory_occupation()

mpmm does not call coroutine functions, such as those of vLLM's `AsyncLLM`: wrap such an engine in a class whose methods
run them in its event loop and wait for the result.

SGLang needs `enable_memory_saver=True`. For a module of torch there is `TorchModule`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TorchModule"]


class TorchModule:
    """A torch module that sleeps in pinned host memory: 8 GB leave an H100 in 0.16 s, and are back in the same time.

    Pinning takes longer, 3.5 s for 8 GB, so the first sleep makes the copies and keeps them for as long as the object
    lives. Parameters and buffers move; a captured CUDA graph would keep their old addresses, so there must be none.
    """

    def __init__(self, module: Any, device: Any = "cuda") -> None:
        """Move `module` to `device`."""
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._module = module.to(self._device)
        # By the tensor's identity: a tensor with several names is copied once.
        self._kept: dict[int, Any] = {}
        self._asleep = False

    @property
    def module(self) -> Any:
        """The module; on its device unless asleep."""
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. Raises RuntimeError while it is asleep."""
        if self._asleep:
            raise RuntimeError("this TorchModule is asleep: call wake_up() first, or acquire it through its manager")
        return self._module(*args, **kwargs)

    def sleep(self, level: int = 1) -> None:
        """Copy the weights to the host and free the device's memory; `level` is vLLM's, and is ignored."""
        if self._asleep:
            return
        tensors = self._tensors()
        with self._torch.no_grad():
            for tensor in tensors:
                kept = self._kept.get(id(tensor))
                if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                    pinned = self._device.type == "cuda"
                    kept = self._torch.empty_like(tensor, device="cpu", pin_memory=pinned)
                    self._kept[id(tensor)] = kept
                kept.copy_(tensor.data, non_blocking=True)
            self._wait()
            for tensor in tensors:
                tensor.data = self._kept[id(tensor)]
        self._asleep = True
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """Take the device's memory again and copy the weights back."""
        if not self._asleep:
            return
        with self._torch.no_grad():
            for tensor in self._tensors():
                # A copy even if the device is the host, because the next sleep overwrites the kept tensor.
                tensor.data = self._kept[id(tensor)].to(self._device, non_blocking=True, copy=True)
            self._wait()
        self._asleep = False

    def _tensors(self) -> list[Any]:
        found = [*self._module.parameters(), *self._module.buffers()]
        return list({id(tensor): tensor for tensor in found}.values())

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)
