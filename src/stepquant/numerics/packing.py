"""Packing of codes of 1 to 8 bits into bytes; only the last byte can have unused bits.

Codes follow one another in a little-endian bit stream. Code `i` of `b` bits occupies stream bits
`i*b .. i*b + b - 1`, least significant bit first. Stream bit `k` is bit `k % 8` (least significant
first) of byte `k // 8`. With 4 bits, codes of even index are in the low nibble.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics.bits import check_bits, max_code
from stepquant.support.errors import StepQuantError


def packed_size(count: int, bits: int) -> int:
    """Return the size of `count` packed codes of `bits` bits, in bytes."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers in `0 .. 2^bits - 1` into uint8 `[bytes]` on the CPU.

    `codes` may have any shape; they are read in row-major order.

    Raises:
        StepQuantError: `bits` is not an int from 1 to 8, or a code is not a whole number in range.
    """
    check_bits(bits, "bits of the codes to pack")
    flat = codes.detach().reshape(-1).cpu()
    if flat.is_floating_point():
        odd = flat[~torch.isfinite(flat) | (flat != flat.round())]
        if odd.numel():
            raise StepQuantError(f"codes to pack hold {float(odd[0])}: expected whole numbers")
    if flat.numel() and (flat.min() < 0 or flat.max() > max_code(bits)):
        raise StepQuantError(
            f"codes to pack lie in {int(flat.min())}..{int(flat.max())}: expected 0.."
            f"{max_code(bits)} for {bits} bits"
        )
    if bits == 8:
        return flat.to(torch.uint8, copy=True)
    if bits == 4:
        return _pack_nibbles(flat.to(torch.uint8))
    return _pack_groups(flat.to(torch.uint8), bits)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack `count` codes from a stream of `pack_bits` into uint8 `[count]`.

    The codes are on the device of `packed`.

    Raises:
        StepQuantError: `bits` is not an int from 1 to 8, or `packed` is not uint8
            `[packed_size(count, bits)]`.
    """
    check_bits(bits, "bits of the packed codes")
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise StepQuantError(
            f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}: expected one "
            "dimension of uint8"
        )
    if packed.numel() != packed_size(count, bits):
        raise StepQuantError(
            f"packed codes hold {packed.numel()} bytes: expected {packed_size(count, bits)} for "
            f"{count} codes of {bits} bits"
        )
    if bits == 8:
        return packed.clone()
    return unpack_nibbles(packed, count) if bits == 4 else _unpack_groups(packed, bits, count)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """`pack_bits` of uint8 `codes [n]` for four bits, in less memory than `_pack_groups`."""
    packed = codes[0::2].clone(memory_format=torch.contiguous_format)
    packed[: len(codes) // 2] |= codes[1::2] << 4
    return packed


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Unpack `count` codes of four bits into uint8 `[count]` on the device of `packed`.

    Unlike `unpack_bits`, this function checks nothing.
    """
    # One int16 for each byte. `packed.to(int16)` would keep an unusual stride of a one-byte tensor,
    # and `view` needs stride 1.
    wide = torch.empty(len(packed), dtype=torch.int16, device=packed.device).copy_(packed)
    wide |= wide << 4
    wide &= 0x0F0F
    return wide.view(torch.uint8)[:count]


# Eight codes of any width fit one int64: unpacked in its eight bytes, packed in its lowest bits.
# Packing joins lanes of 8, 16 and 32 bits in pairs; unpacking splits them.


def _pair_steps(bits: int) -> list[tuple[int, int, int]]:
    """Return `(filled, gap, low)` for lanes of 8, 16 and 32 bits.

    Each lane has `filled` used bits and `gap` unused ones. The mask `low` selects the used bits of
    the lower lane in each pair.
    """
    return [
        (filled, width - filled, sum(((1 << filled) - 1) << at for at in range(0, 64, 2 * width)))
        for width, filled in ((8, bits), (16, 2 * bits), (32, 4 * bits))
    ]


def _pack_groups(codes: Tensor, bits: int) -> Tensor:
    """`pack_bits` of uint8 `codes [n]` for fewer than eight bits."""
    groups = codes.new_zeros(-(-len(codes) // 8), 8)
    groups.view(-1)[: len(codes)] = codes
    wide = groups.view(torch.int64)
    for filled, gap, low in _pair_steps(bits):
        wide = (wide & low) | ((wide >> gap) & (low << filled))
    return wide.view(torch.uint8)[:, :bits].contiguous().view(-1)[: packed_size(len(codes), bits)]


def _unpack_groups(packed: Tensor, bits: int, count: int) -> Tensor:
    """`unpack_bits` for fewer than eight bits."""
    groups = packed.new_zeros(-(-count // 8), 8)
    whole = len(packed) // bits
    groups[:whole, :bits] = packed[: whole * bits].view(whole, bits)
    if whole < len(groups):
        groups[whole, : len(packed) - whole * bits] = packed[whole * bits :]
    wide = groups.view(torch.int64)
    for filled, gap, low in reversed(_pair_steps(bits)):
        wide = (wide & low) | ((wide & (low << filled)) << gap)
    return wide.view(torch.uint8).flatten()[:count]


def pack_channels(codes: Tensor, channel_bits: Tensor) -> Tensor:
    """Pack `codes [C_out, K]` into uint8 `[bytes]`, with `channel_bits[o]` bits for channel `o`.

    Channels are grouped by their bits, fewest first. Each group keeps the channel order and is
    padded to a whole byte. With equal bits everywhere, the result is `pack_bits(codes, bits)`.

    Raises:
        StepQuantError: `channel_bits` is not one whole number per channel, or a code or a number of
            bits is out of range.
    """
    if channel_bits.is_floating_point() or channel_bits.shape != codes.shape[:1]:
        raise StepQuantError(
            f"channel bits are {channel_bits.dtype} of shape {tuple(channel_bits.shape)}: expected "
            f"one whole number for each of {codes.shape[0]} channels"
        )
    groups = [
        pack_bits(codes[channel_bits == bits], bits)
        for bits in sorted(int(b) for b in channel_bits.unique())
    ]
    return torch.cat(groups)


def unpack_channels(packed: Tensor, channel_bits: Tensor, columns: int) -> Tensor:
    """Invert `pack_channels`: return uint8 codes `[C_out, columns]` on the device of `packed`.

    `channel_bits` holds whole numbers, `[C_out]`, on the same device.

    Raises:
        StepQuantError: the size of `packed` does not match, or a number of bits is out of range.
    """
    codes = torch.empty(len(channel_bits), columns, dtype=torch.uint8, device=packed.device)
    start = 0
    for bits in sorted(int(b) for b in channel_bits.unique()):
        members = channel_bits == bits
        channels = int(members.sum())
        count = channels * columns
        stop = start + packed_size(count, bits)
        codes[members] = unpack_bits(packed[start:stop], bits, count).view(channels, columns)
        start = stop
    if start != packed.numel():
        raise StepQuantError(
            f"packed codes hold {packed.numel()} bytes: expected {start} for {len(channel_bits)} "
            f"channels of {columns} codes"
        )
    return codes
