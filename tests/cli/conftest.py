import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from cli_runs import TINY, run


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """As wide as a pipe, where whoever runs the tests says how wide their terminal is, too."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("models") / "float"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_folder(float_folder):
    """What `stepquant quantize` writes, and beside it the JSON record and the printed text."""
    folder = float_folder.with_name("packed")
    result = run(
        "quantize",
        float_folder,
        "--recipe=dilatequant",
        "--weights=4",
        "--activations=8",
        *TINY,
        "--seed=3",
        "--out",
        folder,
        "--json",
        folder.with_name("packed.json"),
    )
    assert result.exit_code == 0, result.stderr
    folder.with_name("packed.txt").write_text(result.stdout)
    return folder
