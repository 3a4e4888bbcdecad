import os

import pytest

from diffquant.core.errors import CheckpointError
from diffquant.io import open_source


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_source(tmp_path / "pipe")
