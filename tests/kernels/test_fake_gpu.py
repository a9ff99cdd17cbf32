"""tools/fake_gpu: what it computes, where PyTorch is a CUDA build; what it says where it is not."""

import textwrap

import pytest
import torch
from processes import ROOT, start


def run(*arguments):
    return start([ROOT / "tools" / "fake_gpu", *arguments])


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is a CUDA build")
def test_other_builds_are_refused():
    done = run("-c", "print('ran')")
    assert done.returncode == 1 and "not a CUDA build" in done.stderr and "ran" not in done.stdout


def test_chips_that_nobody_knows_are_refused():
    done = run("--chip", "sm_75", "-c", "print('ran')")
    assert done.returncode == 1 and "--chip 'sm_75': one of sm_80, sm_86" in done.stderr and "ran" not in done.stdout


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="needs a CUDA build and no GPU")
def test_results_are_those_of_the_host(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch

            torch.manual_seed(0)
            here = torch.nn.Linear(8, 4)
            there = torch.nn.Linear(8, 4).cuda()
            there.load_state_dict(here.state_dict())
            x = torch.randn(3, 8)
            for module, rows in ((here, x.clone()), (there, x.cuda())):
                module(rows.requires_grad_()).square().sum().backward()
            assert torch.equal(there.weight.grad.cpu(), here.weight.grad)
            assert torch.cuda.max_memory_allocated() > 0
            print(there.weight.grad.device)
            """
        )
    )
    done = run("--compute", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cuda:0"


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="needs a CUDA build and no GPU")
def test_bitsandbytes_multiplies_there(tmp_path):
    pytest.importorskip("bitsandbytes")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import bitsandbytes as bnb
            import torch

            w, x = torch.randn(48, 64), torch.randn(5, 64)
            packed, state = bnb.functional.quantize_4bit(w.cuda(), quant_type="nf4", compress_statistics=True)
            weight = bnb.functional.dequantize_4bit(packed, state)
            y = bnb.matmul_4bit(x.cuda(), packed, quant_state=state)
            assert packed.is_cuda and weight.is_cuda and y.is_cuda and (weight.cpu() - w).norm() < 0.2 * w.norm()
            torch.testing.assert_close(y.cpu(), x @ weight.cpu().t())
            """
        )
    )
    done = run("--compute", script)
    assert done.returncode == 0, done.stderr
