"""What to expect of some GPUs at a ZeRO stage."""

from dataclasses import dataclass

from sgmim_fast.planning.checkpoints import checkpoint_size, checkpoint_time
from sgmim_fast.planning.collectives import wire_bytes
from sgmim_fast.planning.inputs import Inputs
from sgmim_fast.planning.memory import state_memory
from sgmim_fast.planning.step_time import optimizer_seconds, step_time
from sgmim_fast.planning.traffic import step_traffic


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a plan. Hours and cost are None where a step takes more pairs than the data set has."""

    gpus: int
    nodes: int
    stage: int
    batch: int
    """Pairs a GPU and micro-step."""
    global_batch: int
    """Pairs an optimizer step."""
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    data_wait_seconds: float
    step_seconds: float
    sent_bytes: float
    """That each GPU sends in a step if the rings are flat."""
    images_per_second: float
    efficiency: float
    """Of so many times the measured rate; the optimizer, which that lacks, counts as a loss."""
    node_pairs_per_second: float
    """That the loaders of a node must deliver."""
    node_read_bytes_per_second: float
    total_read_bytes_per_second: float
    state_bytes: float
    """Weights, gradients, optimizer state and buckets on a GPU."""
    checkpoint_bytes: float
    checkpoint_write_seconds: float
    checkpoint_stall_synchronous_seconds: float
    checkpoint_stall_asynchronous_seconds: float
    steps_per_epoch: int
    steps: int
    checkpoints: int
    epoch_hours: float | None
    total_hours: float | None
    cost: float | None


def row_for(inputs: Inputs, gpus: int, stage: int) -> Row:
    """The row for ``gpus`` and ``stage``; a global batch, if there is one, must divide into their micro-steps."""
    parameters, precision, cluster = inputs.parameters, inputs.precision, inputs.cluster
    nodes = cluster.nodes(gpus)
    batch = inputs.measured.batch
    if inputs.global_batch is not None:
        batch = inputs.global_batch // (gpus * inputs.accumulation)
    total = batch * gpus * inputs.accumulation
    traffic = step_traffic(
        parameters,
        stage=stage,
        precision=precision,
        gpus=gpus,
        accumulation=inputs.accumulation,
        bucket_size=inputs.bucket_size,
    )
    loading = 0.0
    if inputs.loader_rate is not None:
        loading = total / nodes / inputs.loader_rate
    if inputs.storage_read is not None:
        loading = max(loading, total * inputs.pair_bytes / (inputs.storage_read * 1e9))
    time = step_time(
        traffic,
        gpus=gpus,
        cluster=cluster,
        micro_step=batch / inputs.measured.images_per_second,
        optimizer=optimizer_seconds(
            parameters.count,
            stage=stage,
            precision=precision,
            gpus=gpus,
            memory_bandwidth=inputs.memory_bandwidth * 1e9,
        ),
        accumulation=inputs.accumulation,
        overlap=inputs.overlap,
        loading=loading,
    )
    rate = total / time.total
    size = checkpoint_size(parameters, stage=stage, precision=precision, gpus=gpus)
    saving = checkpoint_time(
        size,
        write_speed=inputs.checkpoint_write * 1e9,
        copy_speed=inputs.host_copy * 1e9,
        interval=inputs.checkpoint_every * time.total,
    )
    steps_per_epoch = inputs.images // total
    steps = steps_per_epoch * inputs.epochs
    checkpoints = -(-steps // inputs.checkpoint_every)  # one is always written at the end
    stall = saving.stall_asynchronous if inputs.async_checkpoint else saving.stall_synchronous
    hours = (steps * time.total + checkpoints * stall) / 3600 if steps else None
    memory = state_memory(
        parameters,
        stage=stage,
        precision=precision,
        gpus=gpus,
        bucket_size=inputs.bucket_size,
        overlap=inputs.overlap > 0,
    )
    return Row(
        gpus=gpus,
        nodes=nodes,
        stage=stage,
        batch=batch,
        global_batch=total,
        compute_seconds=time.compute,
        communication_seconds=time.communication,
        exposed_seconds=time.exposed,
        data_wait_seconds=time.data_wait,
        step_seconds=time.total,
        sent_bytes=sum(wire_bytes(part.kind, part.payload, gpus) for part in traffic),
        images_per_second=rate,
        efficiency=rate / (gpus * inputs.measured.images_per_second),
        node_pairs_per_second=rate / nodes,
        node_read_bytes_per_second=rate / nodes * inputs.pair_bytes,
        total_read_bytes_per_second=rate * inputs.pair_bytes,
        state_bytes=memory.total,
        checkpoint_bytes=size.total,
        checkpoint_write_seconds=saving.write,
        checkpoint_stall_synchronous_seconds=saving.stall_synchronous,
        checkpoint_stall_asynchronous_seconds=saving.stall_asynchronous,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        checkpoints=checkpoints,
        epoch_hours=steps_per_epoch * time.total / 3600 if steps else None,
        total_hours=hours,
        cost=None if hours is None or inputs.price is None else hours * gpus * inputs.price,
    )
