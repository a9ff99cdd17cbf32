"""Python runs this at its start, also in processes that a test run starts: see ../__main__.py."""

import atexit
import os
import sys
import time
from pathlib import Path

options = os.environ.get("FAKE_GPU", "").split()
if options:
    import torch

    # torch 2.14: a GPU's backward thread drops a Python object after `backward` has returned, and waits for the
    # interpreter's lock to do so. Python before 3.14 aborts if it waits when the interpreter ends: let it have it.
    atexit.register(time.sleep, 0.01)

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "--compute" in options or "--compiled" in options:
        tools = Path(__file__).resolve().parents[2]
        sys.path[:0] = [str(tools / "fake_gpu"), str(tools)]
        import compute

        compute.install()
        if "--compiled" in options:
            import compiled

            compiled.install(eager="--eager" in options, traffic="--traffic" in options)
        del sys.path[:2]
    if "--everywhere" in options:
        torch.set_default_device("cuda")
