"""Writes the golden checkpoints from hand-written codes, by the format document alone.

It does not use stepquant, so that the format cannot drift with the code. Run it in this folder;
the arithmetic behind the numbers is in test_golden.py.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

UNIFORM = {
    "gain": torch.tensor([2.0]),
    "step_grid": torch.tensor([10.0, 900.0]),
    # 3 bits, two parts. Codes [[0, 1, 2], [3, 4, 5]]: the stream 0 + 1<<3 + 2<<6 + 3<<9 + 4<<12
    # + 5<<15 = 0x02C688, lowest byte first. Codes [[6], [7]]: 6 + 7<<3 = 0x3E.
    "linear.weight_packed": torch.tensor([0x88, 0xC6, 0x02, 0x3E], dtype=torch.uint8),
    "linear.weight_scale": torch.tensor([[0.5, 0.25], [1.0, 2.0]]),
    "linear.weight_zero_point": torch.tensor([[1, 4], [6, 0]], dtype=torch.uint8),
    "linear.act_scale": torch.tensor([[0.5, 1.0], [0.25, 2.0]]),
    "linear.act_zero_point": torch.tensor([[8, 0], [0, 15]], dtype=torch.uint8),
    "linear.act_channel_scale": torch.tensor([1.0, 2.0, 4.0, 1.0]),
    "linear.bias": torch.tensor([1.0, -1.0]),
    # 8 bits, symmetric: weights 0.5 * [10, 0, -10]; the same scale at every step.
    "conv.weight_packed": torch.tensor([138, 128, 118], dtype=torch.uint8),
    "conv.weight_scale": torch.tensor([[0.5]]),
    "conv.weight_zero_point": torch.tensor([[128]], dtype=torch.uint8),
    "conv.act_scale": torch.tensor([[0.5]]),
    "conv.act_zero_point": torch.tensor([[100]], dtype=torch.uint8),
}

# The same model with other weights: out-channel 0 of `linear` has 3 bits, out-channel 1 has 1, and
# zero points count half steps.
MIXED = {
    **UNIFORM,
    # Fewest bits first. First part: codes [[1, 0, 1]] of 1 bit are 0x05; codes [[0, 1, 2]] of 3
    # bits are 0 + 1<<3 + 2<<6 = 0x088. Second part: [[0]] of 1 bit, [[6]] of 3 bits.
    "linear.weight_packed": torch.tensor([0x05, 0x88, 0x00, 0x00, 0x06], dtype=torch.uint8),
    "linear.weight_scale": torch.tensor([[0.5, 2.0], [1.0, 4.0]]),
    "linear.weight_zero_point": torch.tensor([[3, 1], [12, 1]], dtype=torch.uint8),
    "linear.channel_bits": torch.tensor([3, 1], dtype=torch.uint8),
    "linear.bias": torch.tensor([1.5, -1.0]),
}

CONV = {
    "activation_bits": 8,
    "channel_counts": None,
    "channel_scale": False,
    "half_zero_points": False,
    "kind": "conv2d",
    "splits": None,
    "steps": 1,
    "weight_bits": 8,
}
LINEAR = {
    "activation_bits": 4,
    "channel_counts": None,
    "channel_scale": True,
    "half_zero_points": False,
    "kind": "linear",
    "splits": [3, 1],
    "steps": 2,
    "weight_bits": 3,
}
MIXED_LINEAR = {**LINEAR, "channel_counts": [[1, 1], [3, 1]], "half_zero_points": True}

LAYER_DEFAULT = {"splits": None, "channel_scale": False, "steps": 2}


def config(linear: dict) -> dict:
    """`config.json`; what a layer leaves out is in `layer_default`, or absent there as well."""
    mixed = {key: linear[key] for key in ("channel_counts", "half_zero_points") if linear[key]}
    return {
        "_class_name": "GoldenDenoiser",
        "_diffusers_version": "0.42.1",
        "quantization_config": {
            "quant_method": "stepquant",
            "format_version": 1,
            "steps": 2,
            "layer_default": LAYER_DEFAULT,
            "layers": {
                "conv": {"kind": "conv2d", "weight_bits": 8, "activation_bits": 8, "steps": 1},
                "linear": {
                    "kind": "linear",
                    "weight_bits": 3,
                    "activation_bits": 4,
                    "channel_scale": True,
                    "splits": [3, 1],
                    **mixed,
                },
            },
            "float_layers": {},
            "scheme": {"protocol": "golden"},
            "recipe": {},
            "provenance": {"seed": 0},
        },
    }


def checksum(layers: dict, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The section "Checksum" of the format document."""
    text = json.dumps(layers, sort_keys=True, separators=(",", ":")) + "\n"
    for name in sorted(tensors):
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        digest = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
        text += f"{name} {dtype} {digest}\n"
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


if __name__ == "__main__":
    for folder, tensors, linear in (
        ("uniform", UNIFORM, LINEAR),
        ("mixed", MIXED, MIXED_LINEAR),
    ):
        Path(folder).mkdir(exist_ok=True)
        layers = {"conv": CONV, "linear": linear}
        save_file(
            {**tensors, "stepquant_sha256": checksum(layers, tensors)},
            f"{folder}/diffusion_pytorch_model.safetensors",
            metadata={"format": "pt"},
        )
        text = json.dumps(config(linear), indent=2) + "\n"
        Path(folder, "config.json").write_text(text, encoding="utf-8")
