"""What is assumed of a machine and a run where nothing is said; the output names it."""

from typing import NamedTuple


class Assumption(NamedTuple):
    """The value of an option that is not given."""

    value: float
    unit: str
    origin: str


ASSUMED: dict[str, Assumption] = {
    "intra_node": Assumption(450, "GB/s a GPU", "H100 data sheet: NVLink, 900 GB/s in both directions together"),
    "inter_node": Assumption(400, "Gbit/s a node", "one 400 Gbit/s port, as data sheets name it"),
    "intra_latency": Assumption(3, "us a hop", "round figure"),
    "inter_latency": Assumption(10, "us a hop", "round figure"),
    "gpus_per_node": Assumption(8, "GPUs", "the usual H100 node"),
    "memory_bandwidth": Assumption(3350, "GB/s", "H100 SXM data sheet"),
    "overlap": Assumption(0, "", "as with train.overlap_comm off"),
    "bucket_size": Assumption(500_000_000, "elements", "default of train.bucket_size"),
    "accumulation": Assumption(1, "micro-steps", "default of train.accumulation_steps"),
    "images": Assumption(1_281_167, "pairs", "the training images of ImageNet-1k"),
    "epochs": Assumption(100, "epochs", "recipe swin_base_100ep"),
    "pair_bytes": Assumption(370_000, "bytes", "500x375 pixels: JPEG and 16-bit PNG as `sgmim synth` renders them"),
    "checkpoint_write": Assumption(2, "GB/s of all ranks", "round figure"),
    "checkpoint_every": Assumption(1000, "steps", "default of train.checkpoint_every"),
    "host_copy": Assumption(25, "GB/s a GPU", "round figure for PCIe 5"),
}
"""By the option's name with underscores. Data sheets tell peaks: measure your own with nccl-tests."""
