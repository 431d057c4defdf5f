"""Train the feature network behind `fd_fashion` or `fd_cifar10` and write its asset.

    python training/train_features.py fashion --data DIR --out src/stepquant/assets/fashion-features

A small residual classifier (`stepquant.evaluation.feature_network`), trained with SGD, a one-cycle
learning rate, random shifts, flips and changes of light. The asset holds its fp16 weights and the
float64 sums of the training set's features in the state that torchmetrics' FID keeps them in, so
that a distance to the data needs no data. Fashion takes minutes on two CPU cores; CIFAR-10 wants
a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from data import load
from stepquant.evaluation.feature_network import FeatureNetwork, frechet_metric

DATA = {"fashion": "fashion_mnist", "cifar10": "cifar10"}
SIZES = {
    "fashion": {"in_channels": 1, "width": 24, "features": 64, "classes": 10},
    "cifar10": {
        "in_channels": 3,
        "width": 40,
        "features": 128,
        "classes": 10,
        # Small natural objects need the full resolution in the first stage.
        "blocks": [2, 2, 1],
        "first_stride": 1,
    },
}
EPOCHS = {"fashion": 8, "cifar10": 40}
SHIFT = {"fashion": 2, "cifar10": 4}  # pixels
BRIGHTNESS, CONTRAST, NOISE = 0.08, 0.1, 0.03  # largest offset, change of gain, and deviation


@torch.no_grad()
def accuracy(net: FeatureNetwork, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of `images` (uint8) that the classifier assigns to their label."""
    net.eval()
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        right += int((net.classify(x.float() / 255).argmax(1) == y).sum())
    return right / len(labels)


def augment(x: torch.Tensor, shift: int, rng: torch.Generator) -> torch.Tensor:
    """A random shift of up to `shift` pixels, filled with black, and a flip, per image."""
    size = x.shape[-1]
    crops = torch.nn.functional.pad(x, (shift,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    dy, dx = torch.randint(2 * shift + 1, (2, len(x)), generator=rng, device=x.device)
    x = crops[torch.arange(len(x), device=x.device), :, dy, dx]  # [N, C, H, W]
    flip = torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device) < 0.5
    return torch.where(flip, x.flip(-1), x)


def vary_light(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A random offset, gain and faint noise per image `[N, C, H, W]`, cut to [0, 1].

    Without it a distance over the features answers to what nobody sees: a network that only ever
    saw backgrounds of exactly 0 moves far at 3 of 255 grey levels.
    """
    offset, gain, deviation = torch.rand(3, len(x), 1, 1, 1, generator=rng, device=x.device)
    noise = torch.randn(x.shape, generator=rng, device=x.device) * (deviation * NOISE)
    gain = 1 + (2 * gain - 1) * CONTRAST
    return (x * gain + (2 * offset - 1) * BRIGHTNESS + noise).clamp(0, 1)


def main() -> None:
    """Parse the command line, train, measure and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=DATA)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the image sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, help="default: 8 for fashion, 40 for cifar10")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    epochs = args.epochs or EPOCHS[args.name]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    data = {name: value.to(device) for name, value in load(DATA[args.name], args.data).items()}
    images, labels = data["x_train"], data["y_train"]
    net = FeatureNetwork(**SIZES[args.name]).to(device, memory_format=torch.channels_last)
    steps = epochs * (len(images) // args.batch)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    rng = torch.Generator(device).manual_seed(args.seed)
    for _ in track(range(steps), description=args.name):
        net.train()
        index = torch.randint(len(images), (args.batch,), generator=rng, device=device)
        x = augment(images[index].float() / 255, SHIFT[args.name], rng)
        x = vary_light(x, rng).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            logits = net.classify(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    # What ships is fp16: measure and collect the statistics with those very weights.
    net = net.half().float().eval()
    card = {
        "sizes": SIZES[args.name],
        "data": DATA[args.name],
        "parameters": sum(p.numel() for p in net.parameters()),
        "test_accuracy": accuracy(net, data["x_test"], data["y_test"]),
        "epochs": epochs,
        "steps": steps,
        "batch": args.batch,
        "lr": args.lr,
        "shift": SHIFT[args.name],
        "brightness": BRIGHTNESS,
        "contrast": CONTRAST,
        "noise": NOISE,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    metric = frechet_metric(SIZES[args.name]["features"])
    with torch.no_grad():
        for x in images.split(500):
            metric.update(net(x.float() / 255).cpu().double(), real=True)
        held_out = torch.cat(
            [net(x.float() / 255).cpu().double() for x in data["x_test"].split(500)]
        )
    metric.update(held_out, real=False)
    card["fd_test_to_train"] = float(metric.compute())
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {
        # Batch counters are integers that can be too large for fp16.
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in net.state_dict().items()
    }
    save_file(weights, args.out / "model.safetensors")
    sums = {name: value for name, value in metric.state_dict().items() if name.startswith("real_")}
    save_file(sums, args.out / "train_statistics.safetensors")
    (args.out / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
