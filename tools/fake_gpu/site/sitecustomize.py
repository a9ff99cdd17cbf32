"""Python runs this at its start, also in processes that a test run starts: see ../__main__.py."""

import os
import sys
from pathlib import Path

options = os.environ.get("FAKE_GPU", "").split()
if options:
    import torch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "--compute" in options:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import compute

        del sys.path[0]
        compute.install()
    if "--everywhere" in options:
        torch.set_default_device("cuda")
