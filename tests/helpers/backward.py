"""The backward pass in Python, for graphs on a GPU that is not there.

The engine of a torch that is built with CUDA asks each GPU of the graph for its streams, and fails where the machine
has none. Nodes are called by the same rules here, except that their memory is not released and hooks do not run.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Node = Any  # of the graph: a class of C++ per operation


def run_backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = True,
) -> tuple[Tensor | None, ...] | None:
    """Stands for torch's `_engine_run_backward`: adds to the leaves' gradients, or returns those of `inputs`."""
    roots = [_edge(output) for output in outputs]
    wanted = [_edge(x) for x in inputs]
    waiting = _count_users(roots)
    received: dict[Node, dict[int, Tensor]] = defaultdict(dict)
    for edge, gradient in zip(roots, gradients, strict=True):
        _add(received, edge, gradient)
    ready = [node for node in dict.fromkeys(node for node, _ in roots) if not waiting[node]]
    captured: dict[tuple[Node, int], Tensor] = {}
    with torch.set_grad_enabled(create_graph):
        while ready:
            node = ready.pop()
            arrived = received.pop(node, {})
            captured |= {(node, k): arrived[k] for n, k in wanted if n is node and k in arrived}
            is_leaf = hasattr(node, "variable")
            runs = not is_leaf or (accumulate_grad and (not wanted or any(n is node for n, _ in wanted)))
            results = _call(node, arrived) if arrived and runs else ()
            for k, edge in enumerate(node.next_functions):
                if edge[0] is None:
                    continue
                if k < len(results) and results[k] is not None:
                    _add(received, edge, results[k])
                waiting[edge[0]] -= 1
                if not waiting[edge[0]]:
                    ready.append(edge[0])
    if accumulate_grad:
        return None
    found = tuple(captured.get(edge) for edge in wanted)
    if not allow_unreachable and any(gradient is None for gradient in found):
        raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph.")
    return found


def _edge(x: Any) -> tuple[Node, int]:
    edge = get_gradient_edge(x) if isinstance(x, Tensor) else x
    return edge.node, edge.output_nr


def _count_users(roots: Sequence[tuple[Node, int]]) -> Counter[Node]:
    """How many edges of the graph lead to each node."""
    users: Counter[Node] = Counter()
    seen = {node for node, _ in roots}
    open_nodes = list(seen)
    while open_nodes:
        for node, _ in open_nodes.pop().next_functions:
            if node is None:
                continue
            users[node] += 1
            if node not in seen:
                seen.add(node)
                open_nodes.append(node)
    return users


def _add(received: dict[Node, dict[int, Tensor]], edge: tuple[Node, int], gradient: Tensor) -> None:
    """As the forward pass had the tensor in shape and type: broadcasting summed, casts undone."""
    node, k = edge
    wanted = node._input_metadata[k]
    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
    received[node][k] = received[node][k] + gradient if k in received[node] else gradient


def _call(node: Node, arrived: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    gradients = [arrived.get(k) for k in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        known = zip(gradients, node._input_metadata, strict=True)
        gradients = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g for g, m in known]
        results = node.apply(*gradients)
    else:
        results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)
