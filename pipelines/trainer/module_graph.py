"""What a rank trains, as a graph for TensorBoard: its modules with the shapes of their parameters here."""

from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from torch import nn


def module_graph(model: nn.Module) -> GraphDef:
    """A node per module that has parameters of its own or no modules inside, under the names of those that hold it.

    Edges lead from each to the next in the order in which the model holds them. It is read off the modules and not
    traced: what runs between them, and what ranks send each other, is in a profile. Shapes are of this rank's shards.
    """
    graph, before = GraphDef(), ""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own and any(True for _ in module.children()):
            continue
        node = graph.node.add(name=(name or "model").replace(".", "/"), op=type(module).__name__)
        if before:
            node.input.append(before)
        for parameter, tensor in own.items():
            words = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            node.attr[parameter].CopyFrom(AttrValue(s=words.encode()))
        before = node.name
    return graph
