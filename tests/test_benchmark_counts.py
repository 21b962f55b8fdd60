"""What a step must compute and move is counted as it is."""

from benchmarks import arithmetic
from benchmarks.rows import read
from benchmarks.shapes import windows_of
from benchmarks.step_profile import ATTENTION, NORMS, PRODUCTS
from sgmim_fast.config import ModelConfig
from sgmim_fast.train.flops import training_flops_per_image

TINY = ModelConfig(image_size=64, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=4)


def test_counted_products_are_those_of_the_training() -> None:
    """Per image: what a step computes once, whatever its size, is in neither."""
    two, three = (arithmetic.count_step(TINY, size, "torch").parts for size in (2, 3))
    assert sum(three[part].flops - two[part].flops for part in two) == training_flops_per_image(TINY)
    found = arithmetic.count_step(TINY, 3, "torch")
    assert found.parts[PRODUCTS].flops > found.parts[ATTENTION].flops > 0


def test_attention_on_kernels_moves_its_floor() -> None:
    """What ``benchmarks.shapes`` says that a block must move, and the tables and sums of rows, which are small."""
    found = arithmetic.count_step(TINY, 64, "triton").parts[ATTENTION].bytes
    least = 0
    for case in windows_of("", TINY, 64):
        assert case.backward is not None
        stage = int(case.name.split("stage ")[1][0]) - 1
        blocks = TINY.depths[stage]
        if "shifted" in case.name:
            blocks //= 2
        elif TINY.depths[stage] > 1 and case.constants["window"] < case.shapes["qkv"][1]:
            blocks -= blocks // 2
        least += blocks * (case.forward(2).bytes + case.backward(2).bytes)
    assert least <= found < 1.2 * least
    plain = arithmetic.count_step(TINY, 64, "reference").parts
    assert plain[ATTENTION].bytes > 3 * found


def test_norms_and_biases_are_told_apart() -> None:
    """A LayerNorm reads and writes its rows forward, and reads twice and writes once backward."""
    vit = ModelConfig(encoder="vit", image_size=64, embed_dim=32, depths=(2,), num_heads=(1,))
    found = arithmetic.count_step(vit, 64, "torch").parts
    rows = 64 * 17 * 32 * 2
    norms = 2 * 2 + 1
    assert 5 * norms * rows <= found[NORMS].bytes < 1.25 * 5 * norms * rows


def test_recorded_counts_are_those_of_this_code() -> None:
    row = next(
        row
        for row in reversed(read(arithmetic.RESULTS))
        if (row["model"], row["backend"]) == ("sgmim_vit_base", "triton")
    )
    found = arithmetic.count_step(arithmetic.MODELS["sgmim_vit_base"], row["batch"], "triton")
    assert {part: (one.flops, one.bytes) for part, one in found.parts.items()} == {
        part: (one["flops"], one["bytes"]) for part, one in row["parts"].items()
    }
