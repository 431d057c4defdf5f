import pytest

from stepquant.runtime.ops.layer_spec import LayerSpec


def test_columns_are_the_weights_of_an_out_channel() -> None:
    assert LayerSpec("linear", 24, 8, 8, 8).columns == 24
    assert LayerSpec("conv2d", 24, 8, 8, 8, kernel_size=(5, 3)).columns == 24 * 15


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "overflows"),
    [
        (8, 8, True),  # 2 * 255 * 128 = 65280
        (7, 8, True),  # 2 * 255 * 127
        (6, 8, False),  # 2 * 255 * 63 = 32130
        (8, 7, False),  # 2 * 127 * 128 = 32512
        (1, 8, False),
    ],
)
def test_which_products_overflow_int16_in_pairs(
    weight_bits: int, activation_bits: int, overflows: bool
) -> None:
    assert LayerSpec("linear", 8, 8, weight_bits, activation_bits).pair_overflows_int16 == overflows
