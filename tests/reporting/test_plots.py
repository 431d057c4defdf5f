import sys

import pytest
from PIL import Image

from stepquant.reporting.plots import check_plots, write_plots
from stepquant.support.errors import StepQuantError

TIMESTEPS = [980, 660, 330, 0]


def float_record(layers=2):
    rows = []
    for index in range(layers):
        for part in range(2 if index else 1):
            rows.append(
                {
                    "layer": f"up_blocks.0.resnets.{index}.conv1",
                    "part": part,
                    "unsaturated_share": 0.25,
                    "median_kurtosis": 3.5,
                    "low": [-1.0 - index] * 4,
                    "high": [1.0, 2.0, 3.0 + part, 0.0],
                }
            )
    return {"packed": False, "timesteps": TIMESTEPS, "left_float": {}, "layers": rows}


def packed_record():
    def row(layer, scales):
        return {
            "layer": layer,
            "weight_bits": 4,
            "activation_bits": 8,
            "packed_bytes": 72,
            "parts": [8] * len(scales),
            "kernels": ["onednn"] * len(scales),
            "act_scale": scales,
            "act_zero_point": [[3] * len(s) for s in scales],
            "channel_scale": False,
        }

    layers = [
        row("conv_in", [[0.1, 0.2, 0.1, 0.05]]),
        row("time_embedding.linear_1", [[0.1]]),  # one scale for all steps
        row("up_blocks.0.resnets.0.conv1", [[0.1] * 4, [1.0, 2.0, 3.0, 4.0]]),
    ]
    return {"packed": True, "timesteps": TIMESTEPS, "layers": layers}


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (
            float_record(),
            ["activation_ranges", "widest_ranges", "unsaturated_share", "kurtosis"],
        ),
        (packed_record(), ["activation_scales", "bits"]),
    ],
    ids=["float", "packed"],
)
def test_pictures_are_written(tmp_path, record, names):
    paths = write_plots(record, tmp_path / "plots")
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert all(min(Image.open(path).size) > 200 for path in paths)
    assert [file.name for file in tmp_path.iterdir()] == ["plots"]


def test_a_single_step_can_be_drawn(tmp_path):
    record = float_record(1)
    record["timesteps"] = [0]
    for row in record["layers"]:
        row["low"], row["high"] = row["low"][:1], row["high"][:1]
    assert len(write_plots(record, tmp_path / "plots")) == 4


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(StepQuantError, match="exists"):
        write_plots(packed_record(), tmp_path)
    with pytest.raises(StepQuantError, match="exists"):
        check_plots(tmp_path)


def test_a_failure_leaves_nothing(tmp_path):
    record = float_record()
    del record["layers"][0]["median_kurtosis"]
    with pytest.raises(KeyError):
        write_plots(record, tmp_path / "plots")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    with pytest.raises(StepQuantError, match=r"pip install stepquant\[evaluate\]"):
        check_plots(tmp_path / "plots")
