"""Codes of 1 to 8 bits packed into bytes with no bit unused but the last byte's.

Bit order: codes follow one another in a little-endian bit stream. Code `i` of `b` bits occupies
stream bits `i*b .. i*b + b - 1`, its least significant bit first; stream bit `k` is bit `k % 8`
(least significant first) of byte `k // 8`. For 4 bits that is: even codes in the low nibble.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics.bits import check_bits, max_code
from stepquant.support.errors import StepQuantError


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers in `0 .. 2^bits - 1` (any shape, read row by row) into uint8 `[bytes]`."""
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
    """The first `count` codes of a stream that `pack_bits` made, uint8 `[count]`, on its device."""
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
    """`pack_bits` of uint8 `codes [n]` for four bits, in an eighth of the memory."""
    packed = codes[0::2].clone(memory_format=torch.contiguous_format)
    packed[: len(codes) // 2] |= codes[1::2] << 4
    return packed


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """`unpack_bits` for four bits without its checks: uint8 `[count]` on the device of `packed`."""
    # A byte for each of two codes. Made by hand, because `to` keeps odd strides of one byte.
    wide = torch.empty(len(packed), dtype=torch.int16, device=packed.device).copy_(packed)
    wide |= wide << 4
    wide &= 0x0F0F
    return wide.view(torch.uint8)[:count]


# Eight codes of any width are one int64: spread over its eight bytes, or in its lowest bits. Lanes
# of 8, 16 and 32 bits are joined in pairs from the one form to the other, or split.


def _pair_steps(bits: int) -> list[tuple[int, int, int]]:
    """`(filled, gap, low)`: lanes of `filled` bits and a gap; `low` masks each pair's lower."""
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
    """Pack `codes [C_out, K]`, channel `o` with `channel_bits[o]` bits, into uint8 `[bytes]`.

    Channels are grouped by their bits, fewest first, each group in channel order and padded to a
    whole byte. With equal bits everywhere this is `pack_bits(codes, bits)`.
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
    """The inverse of `pack_channels`: uint8 codes `[C_out, columns]` on the device of `packed`.

    `channel_bits` whole numbers `[C_out]` on the same device.
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
