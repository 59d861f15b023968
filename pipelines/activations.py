"""Bytes in a device's memory between a micro batch's forward and its backward pass: an estimate from shapes. No torch.

Counted as arXiv 2205.05198 (sections 4 and 5) counts them, for layers with SwiGLU, RMSNorm and grouped-query attention,
without dropout, and with attention that keeps no scores (flash attention: without the paper's 5 a s^2 b). A layer keeps
per token, in numbers of the training's precision, t being the tensor-parallel size:

    4 hidden                    inputs and results of the two norms; / t under sequence parallelism
    2 (query + key_value) / t   queries, keys, values, and the attention's result
    3 ffn / t                   gate and up before SwiGLU, and what it makes of them

which for ffn = 8/3 hidden, as many weights as GPT's MLP has, is the paper's 34 s b h bytes without its two dropout
masks. With recompute a layer keeps its input, and one layer at a time is there whole. A pipeline stage holds as many
micro batches as are on their way behind it. Left out: what lives within one operation, the teacher's layers (each is
gone when the next is done), communication buffers, and the allocator's own waste.
"""

from collections.abc import Sequence

from pipelines.config import DistilConfig, Layout, Precision, TeacherPrecision, teacher_precision
from pipelines.families import ModelShape
from pipelines.signals import FeatureLoss, pipeline_stage, projection_sizes

# Of one buffer of logits, and the most tokens in one, as core/linear_divergence.py cuts them.
CHUNK_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
CHUNK_TOKENS = {"cpu": 256}


def layer_numbers(shape: ModelShape, ranks: Layout) -> int:
    """What a layer keeps of one token, on each device; layers in plain torch, on a CPU, fuse neither the norms nor
    SwiGLU nor the rotary embedding, and keep their parts too."""
    if ranks.device == "cpu":
        inside = 3 * (shape.axis_size("query") + shape.axis_size("key_value")) + 5 * shape.intermediate_size
        return 6 * shape.hidden_size // _split(ranks) + inside // ranks.tensor
    inside = 2 * (shape.axis_size("query") + shape.axis_size("key_value")) + 3 * shape.intermediate_size
    return 4 * shape.hidden_size // _split(ranks) + inside // ranks.tensor


def activation_bytes(
    teacher: ModelShape,
    student: ModelShape,
    ranks: Layout,
    training: DistilConfig,
    losses: Sequence[FeatureLoss] = (),
    follows_logits: bool = True,
) -> dict[str, int]:
    """{"activations", "loss", "signals"} of the fullest pipeline stage.

    activations: the student's layers. loss: hidden states at the heads, the student's gradient there, and the buffers
    of one chunk of logits. signals: gradients that wait for the backward pass, and the teacher's states until the
    losses are computed. losses: on hidden states and attention. follows_logits: whether the teacher's head is at work.
    """
    size = 2 if training.precision is Precision.bf16 else 4
    held = 4 if teacher_precision(training) is TeacherPrecision.fp32 else 2
    tokens = training.micro_batch_size * training.sequence_length // ranks.context
    micro_batches = max(1, training.global_batch_size // (training.micro_batch_size * ranks.data))
    layers = -(-student.num_hidden_layers // ranks.pipeline)
    whole = layer_numbers(student, ranks)
    stages = []
    for stage in range(ranks.pipeline):
        waiting = min(ranks.pipeline - stage, micro_batches)
        kept = layers * whole * waiting
        if training.recompute:
            kept = layers * student.hidden_size // _split(ranks) * waiting + whole
        last = stage == ranks.pipeline - 1
        own = [
            loss
            for loss in losses
            if pipeline_stage(loss.student_layer, student.num_hidden_layers, ranks.pipeline) == stage
        ]
        stages.append(
            {
                "activations": size * tokens * kept,
                "loss": _loss_bytes(teacher, student, ranks, tokens, (size, held), follows_logits) if last else 0,
                "signals": _signal_bytes(teacher, student, ranks, own, tokens, waiting, (size, held)),
            }
        )
    return max(stages, key=lambda parts: sum(parts.values()))


def _split(ranks: Layout) -> int:
    """Over how many devices the tokens between layers are cut."""
    return ranks.tensor if ranks.sequence_parallel else 1


def _loss_bytes(
    teacher: ModelShape, student: ModelShape, ranks: Layout, tokens: int, sizes: tuple[int, int], follows_logits: bool
) -> int:
    """The final norm's input and result, the gradient of the latter, the teacher's final states; and per model fp32
    logits of one chunk, with their gradient apart in bf16."""
    size, held = sizes  # of a number of the student's, of the teacher's
    per_token = size * 3 * student.hidden_size + (held * teacher.hidden_size if follows_logits else 0)
    return tokens * per_token // _split(ranks) + chunk_of_logits(student, ranks, tokens, size, follows_logits)["bytes"]


def chunk_of_logits(
    student: ModelShape, ranks: Layout, tokens: int, size: int, follows_logits: bool = True
) -> dict[str, int]:
    """{"tokens": of the micro batch's that go through the heads at a time, "bytes": of their logits on a device, fp32
    of each model, with their gradient apart in bf16 on a GPU}. size: bytes of a number of the student's."""
    width = -(-student.vocab_size // ranks.tensor)
    chunk = max(1, CHUNK_BYTES[ranks.device] // (4 * width))
    chunk = min(chunk, CHUNK_TOKENS.get(ranks.device, chunk))
    chunk = min(chunk // 32 * 32 or chunk, tokens)
    apart = 2 if size == 2 and ranks.device == "cuda" else 0
    return {"tokens": chunk, "bytes": (4 * (2 if follows_logits else 1) + apart) * chunk * width}


def _signal_bytes(
    teacher: ModelShape,
    student: ModelShape,
    ranks: Layout,
    losses: Sequence[FeatureLoss],
    tokens: int,
    waiting: int,
    sizes: tuple[int, int],
) -> int:
    size, held = sizes
    gradients = factors = 0
    taken = {}
    for loss in losses:
        shapes = projection_sizes(loss, student.hidden_size, teacher.hidden_size)
        factors += sum(out * into for out, into in shapes)
        attends = loss.heads is not None
        gradients += _state_numbers(student, ranks, attends)
        taken[attends, loss.teacher_layer] = _state_numbers(teacher, ranks, attends)
    return size * (tokens * gradients + factors) * waiting + held * tokens * sum(taken.values())


def _state_numbers(shape: ModelShape, ranks: Layout, attends: bool) -> int:
    """Of one token: its queries and keys, or its hidden state."""
    if attends:
        return (shape.axis_size("query") + shape.axis_size("key_value")) // ranks.tensor
    return shape.hidden_size // _split(ranks)
