"""Record work as a CUDA graph and replay it."""

from collections.abc import Callable

import torch

from megatron_chameleon.parallel import platform

Work = Callable[[], None]


def graph_recorder() -> Callable[[Work], Work]:
    """A decorator that records a function as a CUDA graph on its second call.

    The function must work on tensors that stay where they are, and must never wait for the device.
    The first call runs it normally, so that everything that is set up or compiled once is ready;
    the second call records it, and that call and all later ones replay the graph. On a machine
    without a GPU the function is returned unchanged.

    All functions of one recorder share the memory of their intermediate results, so only one of
    them may run at a time. They draw no random numbers.
    """
    if not platform.has_gpu():
        return lambda work: work
    pool = torch.cuda.graph_pool_handle()

    def record(work: Work) -> Work:
        calls: list[Work] = []

        def call() -> None:
            if not calls:
                calls.append(work)
            elif calls[0] is work:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    work()
                calls[0] = graph.replay
            calls[0]()

        return call

    return record
