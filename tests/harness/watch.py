# SPDX-License-Identifier: Apache-2.0
"""Where a step of the V2 engine would wait for a GPU, and what it allocates.

On a CPU every tensor is in the host's memory, so here a tensor is the device's by
where it comes from: the model's weights, the runner's buffers, what a kernel was
launched with, and what was computed from any of these. To read one of them is to
wait, and so are `synchronize` and a blocking copy into any other tensor.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import vllm_lookahead
from vllm_lookahead import triton_kernels

aten = torch.ops.aten
# Methods that bring a tensor to the host, some of them without calling an operator.
READS = {"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__"}
READS |= {"__float__", "__index__", "__contains__", "__format__", "__repr__"}
# Operators of whose result the host must know the value or the shape.
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.unique_dim,
    aten._unique2,
    aten.unique_consecutive,
    aten.bincount,
}
OURS = [Path(package.__file__).parent for package in (vllm_lookahead, triton_kernels)]
PACKAGES = [*OURS, Path(vllm.__file__).parent]
STAND_INS = [  # for what a GPU runs itself
    Path(__file__).with_name("interpreter.py"),
    OURS[0] / "engine" / "v2" / "cpu_attention.py",
]


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in _pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Watch:
    """Watches whatever runs inside `watching`.

    Attributes:
        waits: where the host would wait, as "FILE:LINE FUNCTION: what".
        allocated: what lookahead's own code allocated, likewise.
        launched: how often each of lookahead's kernels was launched, by name.
        operated: PyTorch operators that lookahead's own code had the device run.
    """

    def __init__(self, on_device: Any = ()) -> None:
        self.waits: Counter[str] = Counter()
        self.allocated: Counter[str] = Counter()
        self.launched: Counter[str] = Counter()
        self.operated: Counter[str] = Counter()
        self.on_device: dict[int, torch.UntypedStorage] = {}
        self.is_on = False
        self.mark(on_device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        launch, watch = GridExecutor.__call__, self

        def launch_unseen(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.mark((args, kwargs))
            if executor.fn.__module__.startswith(vllm_lookahead.__name__):
                self.launched[executor.fn.__name__] += 1
            with self.switched(False):
                launch(executor, *args, **kwargs)

        class Event(torch.cuda.Event):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.synchronize = lambda: watch.wait("synchronize")

        def synchronize(*args: Any) -> None:
            self.wait("synchronize")

        with ExitStack() as stack:
            for place, name, value in (
                (GridExecutor, "__call__", launch_unseen),
                (torch.cuda, "Event", Event),
                (torch.cuda, "synchronize", synchronize),
                (torch.accelerator, "synchronize", synchronize),
            ):
                stack.enter_context(mock.patch.object(place, name, value))
            stack.enter_context(Functions(self))
            stack.enter_context(Operators(self))
            stack.enter_context(self.switched(True))
            yield

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        before, self.is_on = self.is_on, on
        try:
            yield
        finally:
            self.is_on = before

    def mark(self, tree: Any) -> None:
        for tensor in tensors(tree):
            storage = tensor.untyped_storage()
            self.on_device[storage.data_ptr()] = storage  # kept, so never reused

    def is_device(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.untyped_storage().data_ptr() in self.on_device
        )

    def wait(self, what: str) -> None:
        if self.is_on and (site := self.site()):
            self.waits[f"{site}: {what}"] += 1

    def count(self, counter: Counter[str], what: str) -> None:
        """Count what lookahead's own code does."""
        site = self.site() or ""
        if site.startswith(tuple(f"{folder.name}/" for folder in OURS)):
            counter[f"{site}: {what}"] += 1

    def site(self) -> str | None:
        """The line of vLLM or lookahead that runs; None in what stands in for a GPU."""
        site, frame = "elsewhere", sys._getframe(2)
        while frame.f_back:
            path = Path(frame.f_code.co_filename)
            if path in STAND_INS:
                return None
            root = next((p for p in PACKAGES if path.is_relative_to(p)), None)
            if root and site == "elsewhere":
                name = path.relative_to(root.parent)
                site = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return site


class Functions(TorchFunctionMode):
    """Sees what is called in Python."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self,
        func: Callable,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, watch = kwargs or {}, self.watch
        name = getattr(func, "__name__", "")
        if not watch.is_on or not args or not watch.is_device(args[0]):
            return func(*args, **kwargs)
        where = [*args[1:], kwargs.get("device")]
        if name == "to" and any(str(x) == "cpu" for x in where):
            if kwargs.get("non_blocking"):
                with watch.switched(False):  # a copy of the host's own
                    return func(*args, **kwargs).clone()
            watch.wait("to")
        elif name in READS:
            watch.wait(name)
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Sees what is called in PyTorch's own code, too."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, watch = kwargs or {}, self.watch
        result = func(*args, **kwargs)
        if not watch.is_on:
            return result
        given = tensors((args, kwargs))
        packet = func.overloadpacket
        if any(map(watch.is_device, given)):
            masked = packet in (aten.index, aten.index_put, aten.index_put_) and any(
                x is not None and x.dtype == torch.bool for x in args[1]
            )
            counted = packet is aten.repeat_interleave and not kwargs.get("output_size")
            if packet in WAITS or masked or counted:
                watch.wait(str(packet))
            if packet is aten.copy_ and not watch.is_device(args[0]):
                if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                    watch.wait(str(packet))
            else:
                watch.mark(result)
        known = {x.untyped_storage().data_ptr() for x in given}
        new = [
            x for x in tensors(result) if x.untyped_storage().data_ptr() not in known
        ]
        for _ in new:
            watch.count(watch.allocated, str(packet))
        if any(map(watch.is_device, given)) and (new or func._schema.is_mutable):
            watch.count(watch.operated, str(packet))  # a view takes no launch
        return result


class WatchedSteps(Watch):
    """Watches the steps of a model runner.

    Attributes:
        steps: of each step, how many requests were fed trees; `allocated`, `launched`
            and `operated` are the last one's.
        most_launched: of any step.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__((runner.model.state_dict(), runner.kv_caches))
        for name in ("input_buffers", "req_states", "step", "slots", "pages"):
            if hasattr(runner, name):
                self.mark(vars(getattr(runner, name)))
        self.steps: list[int] = []
        self.most_launched: Counter[str] = Counter()
        execute, sample = runner.execute_model, runner.sample_tokens

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            for counter in (self.allocated, self.launched, self.operated):
                counter.clear()
            with self.watching():
                result = execute(*args, **kwargs)
            plan = runner.step.plan if hasattr(runner, "step") else None
            self.steps.append(plan.num_trees if plan else 0)
            return result

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            with self.watching():
                result = sample(*args, **kwargs)
            self.most_launched |= self.launched
            return result

        runner.execute_model, runner.sample_tokens = execute_model, sample_tokens
