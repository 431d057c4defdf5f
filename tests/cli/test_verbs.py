import pytest
from PIL import Image

import stepquant
from stepquant import api
from tests.cli.conftest import record, run
