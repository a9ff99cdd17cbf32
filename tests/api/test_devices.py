"""Devices that lack what CPUs and CUDA have, as Apple's GPUs and some of Intel's do: here a CPU that refuses it."""

import copy
import warnings

import oracle
import pytest
import torch
from oracle import TorchDispatchMode, inputs, llama, moved, randomised

import peftfast
from peftfast import devices
from peftfast.calibration.eva import RunningComponents
from peftfast.extraction.factors import svd

TARGETS = ["q_proj", "down_proj"]
FACTORS = {"A": (2, 24), "B": (16, 2)}


class Narrow(TorchDispatchMode):
    """No operation makes a tensor in fp64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} makes {tensor.dtype}, which this device has not")
        return out


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(devices, "_WITH_FP64", ())
    return Narrow()


def adapted(**changes):
    config = peftfast.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})
    return randomised(peftfast.get_peft_model(llama(), config))


def logits(model):
    return model(**inputs(model)).logits


def merged(**changes):
    def merge():
        model = adapted(**changes)
        before = logits(model)
        changed = model.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default")
        model.merge_adapter(safe_merge=True)
        after = logits(model)
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        return after, changed, logits(model.merge_and_unload())

    merge.__name__ = " ".join(["merged", *changes])
    return merge


def adalora():
    config = peftfast.AdaLoraConfig(
        target_modules=TARGETS, task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=5, tinit=1, tfinal=2
    )
    model = moved(peftfast.get_peft_model(llama(), config))
    model.base_model.shrink_after_final = True
    return (torch.tensor(oracle.descend(model.train(), 6)),)


def change(tensors):
    return [tensors[k.replace("lora_A", "lora_B")] @ tensors[k] for k in sorted(tensors) if "lora_A" in k]


def extracted():
    tuned = adapted().merge_and_unload()
    return [part for rank in (4, 0.9) for part in change(peftfast.extract_lora(llama(), tuned, rank=rank)[1])]


def converted():
    models = adapted(), adapted(use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [part for m in models for rank in (4, 0.9) for part in change(peftfast.convert_to_lora(m, rank)[1])]


def calibrated():
    model = llama()
    ids = inputs(model)["input_ids"]
    data = [{"input_ids": part, "labels": part} for part in ids.chunk(2)]
    settings = {"init_lora_weights": "eva", "eva_config": peftfast.EvaConfig()}
    config = peftfast.LoraConfig(r=4, target_modules=TARGETS, **settings)
    ranks = [peftfast.discover_ranks(model, config, data, by=by) for by in ("variance", "gradient")]
    state = peftfast.get_eva_state_dict(peftfast.get_peft_model(model, config), data, show_progress_bar=False)
    return [torch.tensor([list(found.values()) for found in ranks]), *(part.abs() for part in state.values())]


def captured():
    model = adapted().train()
    ids = inputs(model)["input_ids"]
    batch = {"input_ids": ids, "labels": ids}
    step = peftfast.capture_training_step(model, batch)
    return (step(batch),)


@pytest.mark.parametrize(
    "run",
    [
        merged(use_dora=True), merged(trainable_token_indices=[1, 2]), adalora, extracted, converted, calibrated,
        captured,
    ],
    ids=lambda run: run.__name__,
)  # fmt: skip
def test_what_is_computed_in_fp64_has_a_way_without(run, narrow):
    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    with narrow:
        found = run()
    torch.testing.assert_close(list(found), list(expected), rtol=1e-4, atol=1e-5)


def test_singular_values_that_a_device_does_not_find_are_found_by_the_host(monkeypatch):
    own, asked = torch.linalg.svdvals, []

    def svdvals(matrix):
        asked.append(matrix)
        if len(asked) == 1:
            raise NotImplementedError(
                "The operator 'aten::_linalg_svd.U' is not currently implemented for the MPS device"
            )
        return own(matrix)

    monkeypatch.setattr(torch.linalg, "svdvals", svdvals)
    assert torch.equal(devices.singular_values(torch.diag(torch.tensor([1.0, 3.0]))), torch.tensor([3.0, 1.0]))
    assert len(asked) == 2


def test_what_is_drawn_from_a_seed_of_its_own_moves_no_device(monkeypatch):
    """`torch.manual_seed` begins the random numbers of all devices anew, of which one alone is restored."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(9)
    seeded = torch.rand(2)
    torch.manual_seed(3)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it begins those of other devices anew"))
    with devices.forked(torch.device("cpu"), 9):
        assert torch.equal(torch.rand(2), seeded)
    components = RunningComponents(2)
    components.update(torch.eye(8, 4), 0.9)
    svd(torch.eye(600), 4)
    assert torch.equal(torch.rand(2), expected)


class Waits(TorchDispatchMode):
    """No copy is left to come when the host has gone on: on Apple's GPUs it may then read memory that has been given
    away (pytorch#189690)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            assert not any(args[2:]) and not kwargs
        return func(*args, **kwargs or {})


def test_copies_to_devices_other_than_cuda_are_waited_for(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = adapted().train()
    batch = {name: ids for name in ("input_ids", "labels") for ids in inputs(model).values()}
    step = peftfast.capture_training_step(model, batch)
    pool = peftfast.AdapterPool(llama(), 1, target_modules=TARGETS, host_capacity=0)
    pool.register("one", tmp_path)
    with Waits():
        step(batch)
        pool(**inputs(model), adapter_names=["one", "one"])
    pool.close()


class Own(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_what_the_host_makes_is_there_whatever_the_default_device_is():
    """As after `torch.set_default_device("cuda")`; the default here holds no numbers."""
    layer, x = Own(24, 16), torch.randn(4, 24)
    config = peftfast.LoraConfig(r=2, target_modules=["m"], init_lora_weights="pissa_niter_2")
    factors = {f"base_model.model.m.lora_{side}.weight": torch.randn(shape) for side, shape in FACTORS.items()}

    def run():
        base = oracle.One(copy.deepcopy(layer))
        how = {"by": "gradient", "forward_fn": lambda model, batch: model(batch), "loss_fn": torch.sum}
        yield peftfast.discover_ranks(base, peftfast.LoraConfig(r=2, target_modules=["m"]), [x], **how)
        pool = peftfast.AdapterPool(base, 1, target_modules=["m"])
        pool.register("one", (peftfast.LoraConfig(r=2, target_modules=["m"]), factors))
        yield pool(x, adapter_names=["one"] * 4)
        pool.close()
        adapted = peftfast.get_peft_model(oracle.One(copy.deepcopy(layer)), config)
        yield adapted.base_model.model.m.weight
        adapted.merge_adapter()  # which tries modules that have a forward of their own
        yield adapted(x)

    expected = list(run())
    with torch.device("meta"):
        found = list(run())
    torch.testing.assert_close(found, expected)
