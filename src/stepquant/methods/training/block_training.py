"""Block-by-block training: inputs, targets and resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stepquant.calibration.block_inputs import (
    BlockData,
    capture_inputs,
    capture_outputs,
    execution_order,
)
from stepquant.calibration.block_replay import Replayable, replayable_blocks
from stepquant.calibration.nested import pick
from stepquant.calibration.spill import Rows
from stepquant.calibration.trajectories import Trajectories
from stepquant.methods.session import Session
from stepquant.methods.training.steps_together import coherent_inputs, steps_of_each
from stepquant.models.calling import tensors_in, with_tensors
from stepquant.quantizers import QuantLayer
from stepquant.support.errors import StepQuantError
from stepquant.support.moved_modules import old_names

BYTES_OF_TARGETS = 512 << 20  # limit for float-chain outputs kept at once
BYTES_OF_OUTPUTS = 4 << 30  # limit for outputs of finished blocks; above it, blocks run again

# (block's name, block, its data, generator) -> held-out losses (before, after)
TrainBlock = Callable[[str, nn.Module, BlockData, torch.Generator], tuple[float, float]]


def training_inputs(
    session: Session,
    step: str,
    samples: int,
    together: int = 1,
    trajectories: Trajectories | None = None,
) -> Trajectories:
    """Calibration inputs for training, spread evenly over the sampling steps.

    Args:
        session: Gives the calibration trajectories and the seed.
        step: Name of the step, for errors.
        samples: Number of inputs; all, if there are fewer.
        together: Above 1, several steps of each trajectory are taken instead, see
            `coherent_inputs`.
        trajectories: Inputs to choose from, in place of the session's.

    Raises:
        StepQuantError: There are fewer than 2 inputs, or with `together` above 1 fewer than 2
            images.
    """
    source = session.trajectories if trajectories is None else trajectories
    if together > 1:
        return coherent_inputs(source, samples, together, step, session.seed)
    data = source.subset(samples, session.seed)
    if len(data) < 2:
        raise StepQuantError(
            f"step '{step}' has {len(data)} calibration input: expected at least 2, one "
            "to train on and one held out; raise calibration.trajectories or calibration.steps"
        )
    return data


def steps_taken(session: Session, samples: int, together: int) -> int:
    """Number of steps of each trajectory in `training_inputs`; 1 if `together` is 1."""
    return 1 if together == 1 else steps_of_each(session.trajectories, samples, together)


def trained_layers(session: Session, block: str) -> list[QuantLayer]:
    """The quantized layers of `block` that are trained with it.

    Layers that embed the timestep inside a block, as in a DiT, are not trained: they keep their
    first grids and nearest codes. The whole block depends on the embedding, one row for each
    sample. Training it with the rest, weights or their rounding, makes it drift and leaves blocks
    worse on held-out inputs (docs/explanation/results.md has figures). An embedding that is a
    block of its own has its own target, and is trained.
    """
    embeds = session.adapter.time_embedding_layers(session.float_model)
    layers = {
        name: layer
        for name, layer in session.layers().items()
        if name == block or name.startswith(f"{block}.")
    }
    return [layer for name, layer in layers.items() if name not in embeds] or list(layers.values())


def train_blocks(
    session: Session,
    key: str,
    doing: str,
    data: Trajectories,
    batch: int,
    train: TrainBlock,
    float_inputs: bool = False,
) -> list[dict[str, Any]]:
    """Call `train` for each block that has quantized layers, in execution order.

    A block's inputs are the outputs of the chain quantized so far, its targets those of the float
    chain.

    Args:
        session: Gives the models; `session.model` changes in place.
        key: Prefix of the pieces in the work folder. It keeps finished blocks, which a resumed run
            loads from there.
        doing: Name of the stage in progress output.
        data: Calibration inputs.
        batch: Batch size of training; captures run `2 * batch` samples at once.
        train: Trains one block and returns its held-out losses.
        float_inputs: Take the inputs from the float chain too.

    Returns:
        A record for each block, with its name and its held-out losses before and after.
    """
    model, float_model = session.model, session.float_model
    names = [
        name
        for name in execution_order(model, session.adapter.blocks(float_model), data)
        if any(layer == name or layer.startswith(name + ".") for layer in session.layers())
    ]
    records = []
    targets: dict[str, Tensor] = {}
    inputs_from = float_model if float_inputs else model
    # Outputs of finished blocks, so that none of these runs again for each block behind it.
    outputs: dict[str, Any] = {}
    replayable = replayable_blocks(float_model, names, data)
    if most_kept(names, replayable) * len(data) > BYTES_OF_OUTPUTS:
        replayable = {}
    with session.reporter.task(doing, total=len(names)) as task:
        for index, name in enumerate(names):
            block = model.get_submodule(name)
            piece = f"{key}/{index:03d}-{name}"
            kept = session.work.load(piece)
            args, kwargs = capture_inputs(
                inputs_from, name, data, 2 * batch, outputs, session.spill
            )
            if kept is None:
                if name not in targets:
                    targets = _targets(session, names[index:], data, 2 * batch)
                examples = BlockData(args, kwargs, targets.pop(name), data.timestep, session.spill)
                generator = torch.Generator().manual_seed(session.seed * 1009 + index)
                losses = train(name, block, examples, generator)
                session.work.save(piece, {**block.state_dict(), "losses": torch.tensor(losses)})
            else:
                losses = tuple(kept.pop("losses").tolist())
                block.load_state_dict(kept)
                targets.pop(name, None)
            if name in replayable:
                block = inputs_from.get_submodule(name)
                outputs[name] = _run(session, block, args, kwargs, data.timestep, 2 * batch)
            for done, y in outputs.items():
                if replayable[done].last <= index:  # from here on, only its shape is read
                    outputs[done] = _forgotten(y, len(data))
            records.append({"block": name, "loss_before": losses[0], "loss_after": losses[1]})
            note = f"{name} loss {losses[0]:.2e} -> {losses[1]:.2e}"
            task.advance(note=note, resumed=kept is not None)
    return records


def most_kept(order: list[str], replayable: Mapping[str, Replayable]) -> int:
    """Most bytes per sample that the kept outputs of blocks take at once.

    `order` has the blocks' names in execution order.
    """
    return max(
        sum(
            replayable[name].nbytes
            for name in order[: index + 1]
            if name in replayable and replayable[name].last > index
        )
        for index in range(len(order))
    )


@torch.no_grad()
def _run(
    session: Session,
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timestep: Tensor,
    batch: int,
) -> Any:
    """Outputs `[N, ...]` of `block` for its inputs at `timestep [N]`, in batches of `batch`."""
    joined: list[Rows] = []
    output: Any = None
    for start in range(0, len(timestep), batch):
        part = slice(start, start + batch)
        session.context.set_timestep(timestep[part])
        own_args, own_kwargs = pick((args, kwargs), part)
        output = block(*own_args, **own_kwargs)
        tensors = tensors_in(output)
        joined = joined or [Rows(len(timestep), session.spill) for _ in tensors]
        for rows, tensor in zip(joined, tensors, strict=True):
            rows.add(tensor)
    return with_tensors(output, (rows.joined() for rows in joined))


def _forgotten(output: Any, count: int) -> Any:
    """`output` with its shapes, but only the values of the first sample, for `count` samples."""

    def expanded(tensor: Tensor) -> Tensor:
        return tensor[:1].clone().expand(count, *tensor.shape[1:])

    return tree_map_only(Tensor, expanded, output)


def _targets(
    session: Session, names: list[str], data: Trajectories, batch: int
) -> dict[str, Tensor]:
    """Float outputs of as many of `names` as memory allows, but at least of the first."""
    model = session.float_model
    one = capture_outputs(model, names, data.subset(1, 0), 1)
    chosen: list[str] = []
    total = 0
    for name in names:
        total += one[name].nbytes * len(data)
        if chosen and total > BYTES_OF_TARGETS:
            break
        chosen.append(name)
    return capture_outputs(model, chosen, data, batch, session.spill)


_GUARD = "stepquant.methods.training.guarded_block"
__getattr__ = old_names(
    __name__, {name: f"{_GUARD}.{name}" for name in ("GuardedBlock", "is_check", "mixed_batches")}
)
