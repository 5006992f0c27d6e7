# SPDX-License-Identifier: Apache-2.0
"""Time kernels as a model's step runs them: in a CUDA graph, one after another."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def microseconds(calls: Sequence[Call], repeats: int = 25) -> float:
    """Median time of a call, over replays of a graph that holds all of them.

    Give calls on different tensors, larger together than the L2 cache, where a
    model would not find them there. Without a GPU: the time in the interpreter.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compile, and let libraries choose
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
