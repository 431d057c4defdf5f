"""Writes the golden checkpoint from hand-written codes, by docs/format.md alone.

It does not use stepquant, so that the format cannot drift with the code. Run it in this folder;
the arithmetic behind the numbers is in test_golden.py.
"""

import hashlib
import json

import torch
from safetensors.torch import save_file

TENSORS = {
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

LAYERS = {
    "conv": {
        "activation_bits": 8,
        "channel_scale": False,
        "kind": "conv2d",
        "splits": None,
        "steps": 1,
        "weight_bits": 8,
    },
    "linear": {
        "activation_bits": 4,
        "channel_scale": True,
        "kind": "linear",
        "splits": [3, 1],
        "steps": 2,
        "weight_bits": 3,
    },
}

CONFIG = {
    "_class_name": "GoldenDenoiser",
    "_diffusers_version": "0.42.1",
    "quantization_config": {
        "quant_method": "stepquant",
        "format_version": 1,
        "steps": 2,
        "layer_default": {"splits": None, "channel_scale": False, "steps": 2},
        "layers": {
            "conv": {"kind": "conv2d", "weight_bits": 8, "activation_bits": 8, "steps": 1},
            "linear": {
                "kind": "linear",
                "weight_bits": 3,
                "activation_bits": 4,
                "channel_scale": True,
                "splits": [3, 1],
            },
        },
        "float_layers": {},
        "scheme": {"protocol": "golden"},
        "recipe": {},
        "provenance": {"seed": 0},
    },
}


def checksum() -> torch.Tensor:
    """The section "Checksum" of docs/format.md."""
    text = json.dumps(LAYERS, sort_keys=True, separators=(",", ":")) + "\n"
    for name in sorted(TENSORS):
        dtype = str(TENSORS[name].dtype).removeprefix("torch.")
        digest = hashlib.sha256(TENSORS[name].numpy().tobytes()).hexdigest()
        text += f"{name} {dtype} {digest}\n"
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


if __name__ == "__main__":
    save_file(
        {**TENSORS, "stepquant_sha256": checksum()},
        "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    with open("config.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(CONFIG, indent=2) + "\n")
