"""EVA and CorDA against PEFT, and ranks chosen for a plain LoRA."""

import copy
import dataclasses
import importlib.util
import sys
import types
import warnings

import oracle
import peft
import pytest
import torch

import peftfast
from peftfast.calibration import eva
from peftfast.calibration.eva import RunningComponents


def peft_preprocess_corda(*args, **kwargs):
    # PEFT imports a package that it does not depend on, for a decorator
    if "attr" not in sys.modules and importlib.util.find_spec("attr") is None:
        sys.modules["attr"] = types.ModuleType("attr")
        sys.modules["attr"].dataclass = dataclasses.dataclass
    from peft.tuners.lora.corda import preprocess_corda

    return preprocess_corda(*args, **kwargs)


def batches(count=3, size=8, length=16):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(1, oracle.VOCABULARY, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def config(library, **changes):
    settings = {"rho": changes.pop("rho", 2.0), "whiten": changes.pop("whiten", False)}
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"], **changes}
    return library.LoraConfig(**options, init_lora_weights="eva", eva_config=library.EvaConfig(**settings))


def initialised(library, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(oracle.llama(), config(library, **changes))
        library.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    return model


@pytest.mark.parametrize("changes", [{}, {"rho": 1.0}, {"whiten": True}, {"rank_pattern": {"o_proj": 6}}])
def test_eva_is_pefts(changes):
    theirs, ours = initialised(peft, **changes), initialised(peftfast, **changes)
    own = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    peer = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    assert own.keys() == peer.keys()
    total = sum(p.shape[0] for n, p in own.items() if "lora_A" in n)
    assert total == sum(p.shape[0] for n, p in peer.items() if "lora_A" in n)
    for name, p in own.items():
        if "lora_B" in name:
            assert not p.any()
            continue
        # q and k have the same input: which of the two gets the odd rank is arbitrary
        rank = min(len(p), len(peer[name]))
        assert abs(len(p) - len(peer[name])) <= (1 if ".q_proj" in name or ".k_proj" in name else 0)
        rows = torch.nn.functional.normalize(p[:rank]) @ torch.nn.functional.normalize(peer[name][:rank]).t()
        assert rows.diagonal().abs().min() > 0.99
        if changes.get("whiten") and (".q_proj" in name or ".k_proj" in name):
            continue  # PEFT divides components that layers share once for each of them
        torch.testing.assert_close(p[:rank].norm(dim=1), peer[name][:rank].norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_after_loading_without_memory(rho):
    """PEFT's recipe: factors on the meta device until EVA has found their values."""
    expected = {n: p for n, p in initialised(peftfast, rho=rho).named_parameters() if "lora_" in n}
    model = peftfast.get_peft_model(oracle.llama(), config(peftfast, rho=rho), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in model.named_parameters() if "lora_" in n)
    peftfast.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    model(**batches()[0], labels=batches()[0]["input_ids"]).loss.backward()


def test_eva_adapter_survives_its_file_in_both_libraries(tmp_path):
    model = oracle.randomised(initialised(peftfast), 1.0, only="lora_B")
    ranks = {k: layer.r["default"] for k, layer in model.base_model.inventory.layers.items()}
    assert len(set(ranks.values())) > 1
    scalings = {layer.scaling["default"] for layer in model.base_model.inventory.layers.values()}
    assert max(scalings) - min(scalings) < 1e-9  # alpha follows the rank
    expected = oracle.logits(model.eval())
    model.save_pretrained(tmp_path)
    for library in (peft, peftfast):
        loaded = library.PeftModel.from_pretrained(oracle.llama(), tmp_path).eval()
        torch.testing.assert_close(oracle.logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_eva_layers_without_a_rank_are_left_as_they_were():
    model = peftfast.get_peft_model(oracle.llama(), config(peftfast))
    state = peftfast.get_eva_state_dict(model, batches(), show_progress_bar=False)
    gone = next(iter(state))
    state[gone] = state[gone][:0]
    peftfast.initialize_lora_eva_weights(model, eva_state_dict=state)
    key = gone.removeprefix("base_model.model.")
    assert key not in model.base_model.inventory.layers and key not in model.peft_config["default"].target_modules
    assert type(model.get_submodule(gone)) is torch.nn.Linear
    model(**batches()[0])


def test_eva_names_what_is_left_and_no_module_that_ends_alike(tmp_path):
    def net():
        torch.manual_seed(0)
        return torch.nn.ModuleDict(
            {"lin": torch.nn.Linear(8, 8), "z": torch.nn.ModuleDict({"lin": torch.nn.Linear(8, 8)})}
        )

    config = peftfast.LoraConfig(r=2, target_modules=["lin"], init_lora_weights="eva", eva_config=peftfast.EvaConfig())
    model = peftfast.get_peft_model(net(), config)
    peftfast.initialize_lora_eva_weights(model, eva_state_dict={"lin": torch.eye(8)[:3], "z.lin": torch.zeros(0, 8)})
    model.save_pretrained(tmp_path)
    for library in (peftfast, peft):
        again = library.PeftModel.from_pretrained(net(), tmp_path)
        assert again.base_model.targeted_module_names == ["lin"]


def test_eva_without_an_adapter_and_with_components_that_are_exact():
    """On data of a known spectrum the components are those of a full decomposition."""
    from peftfast.calibration.eva import RunningComponents

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 24, generator=generator) * torch.logspace(0, -2, 24) + 3.0
    x[:, 0] += torch.linspace(-1, 1, 600)  # every batch has a mean of its own
    running = RunningComponents(4)
    for part in x.split(100):
        assert running.update(part, 0.99)
    centred = (x - x.mean(0)).double()
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    assert (running.components.double() @ vh[:4].t()).abs().diagonal().min() > 0.999
    share = s[:4] ** 2 / centred.square().sum()
    torch.testing.assert_close(running.explained, share, rtol=2e-2, atol=1e-4)
    assert not running.update(x[:3], 0.99)  # fewer rows than components
    plain = peftfast.get_eva_state_dict(oracle.llama(), batches(), config(peftfast), show_progress_bar=False)
    assert all(not k.startswith("base_model") for k in plain)


def test_progress_stays_on_its_line(capsys):
    peftfast.get_eva_state_dict(oracle.llama(), batches(), config(peftfast), show_progress_bar=True)
    lines = capsys.readouterr().out.split("\r")
    assert len(lines) > 1 and lines[0] == "" and lines[-1] == "8/8 layers have converged\n"


@pytest.mark.parametrize("calibrate", ["variance", "gradient", "eva", "corda"])
def test_every_module_is_left_in_its_own_mode(calibrate):
    base = oracle.llama().train()
    base.model.layers[0].eval()
    modes, seen = [m.training for m in base.modules()], set()
    base.model.layers[1].register_forward_hook(lambda module, *_: seen.add(module.training))
    data = [{**batch, "labels": batch["input_ids"]} for batch in batches()]
    cfg = peftfast.LoraConfig(
        r=2, target_modules=["q_proj"], corda_config=peftfast.CordaConfig(), init_lora_weights="corda"
    )
    if calibrate == "eva":
        peftfast.get_eva_state_dict(base, data, config(peftfast), show_progress_bar=False)
    elif calibrate == "corda":
        peftfast.preprocess_corda(base, cfg, lambda: base(**data[0]))
    else:
        peftfast.discover_ranks(base, cfg, data, by=calibrate)
    assert seen == {False} and [m.training for m in base.modules()] == modes


def test_eva_says_what_is_wrong():
    plain = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        peftfast.initialize_lora_eva_weights(plain, batches())
    model = peftfast.get_peft_model(oracle.llama(), config(peftfast))
    with pytest.raises(ValueError, match="dataloader is required"):
        peftfast.initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="dataloader is empty"):
        peftfast.initialize_lora_eva_weights(model, [])
    with pytest.raises(ValueError, match="again and again, which a generator cannot be"):
        peftfast.initialize_lora_eva_weights(model, (batch for batch in batches()))
    started = iter(batches())
    once = type("Once", (), {"__iter__": lambda self: started})()
    with pytest.raises(ValueError, match="again and again, which a Once cannot be"):
        peftfast.initialize_lora_eva_weights(model, once, show_progress_bar=False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj \(8\)'.*; use larger batches"):
        peftfast.initialize_lora_eva_weights(model, batches(1, 1, 2), show_progress_bar=False)
    with pytest.raises(ValueError, match="must be a PeftModel"):
        peftfast.initialize_lora_eva_weights(oracle.llama(), batches())
    with pytest.raises(ValueError, match="not found in the model"):
        peftfast.get_eva_state_dict(model, batches(), prepare_layer_inputs_fn={"nowhere": len})
    with pytest.raises(TypeError, match="inputs must be a dictionary"):
        peftfast.initialize_lora_eva_weights(
            model, [batches()[0]["input_ids"]], forward_fn=lambda m, x: m(x), show_progress_bar=False
        )
    with pytest.raises(TypeError, match="unsupported input type <class 'NoneType'>.*in layer some, please"):
        eva.all_rows((None, 1), None, "some")
    with pytest.raises(ValueError, match="'pixels' has no tokens"):
        eva.prepare_model_inputs_fn_language_modeling({"pixels": torch.ones(2)}, config(peftfast))
    with torch.no_grad():
        model.get_input_embeddings().weight[batches()[1]["input_ids"][1, 0]] = torch.inf
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: its inputs hold NaN or infinite values"):
        peftfast.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)


def test_components_ask_cuda_for_nothing_on_other_devices():
    found = RunningComponents(2)
    assert all(found.update(torch.empty(8, 4, device="meta"), 0.9) for _ in range(2))


def test_eva_takes_a_mask_without_token_ids():
    model = peftfast.get_peft_model(oracle.llama(), config(peftfast))
    table = model.get_input_embeddings()
    embedded = [{"inputs_embeds": table(b["input_ids"]).detach(), "attention_mask": b["attention_mask"]}
                for b in batches()]  # fmt: skip
    found, expected = (peftfast.get_eva_state_dict(model, data, show_progress_bar=False)
                       for data in (embedded, batches()))  # fmt: skip
    assert all(torch.equal(found[name], part) for name, part in expected.items())


class Classifier(torch.nn.Module):
    """Its layers see a batch's tokens, their pooled ones, and those of another sequence."""

    def __init__(self):
        super().__init__()
        self.table, self.names = torch.nn.Embedding(20, 6), ("tokens", "pooled", "others")
        for name in self.names:
            setattr(self, name, torch.nn.Linear(6, 6))

    def inputs(self, ids):
        return self.table(ids), self.table(ids)[:, 0], self.table(ids[:, 1:4])

    def forward(self, input_ids, attention_mask, labels):
        return [getattr(self, name)(x) for name, x in zip(self.names, self.inputs(input_ids), strict=True)]


def test_eva_takes_all_rows_of_layers_that_do_not_see_the_masks_tokens():
    torch.manual_seed(0)
    model, ids, mask = Classifier(), torch.randint(1, 20, (32, 7)), torch.ones(32, 7)
    ids[:, 5:], mask[:, 5:] = 0, 0
    with torch.no_grad():
        model.table.weight.mul_(2.0 ** -torch.arange(6))[0] = 1e3  # of padding
        x = model.inputs(ids)
    data = [{"input_ids": ids, "attention_mask": mask, "labels": torch.arange(32) % 2}]
    cfg = config(peftfast, target_modules=list(model.names), r=2, rho=1.0)
    found = peftfast.get_eva_state_dict(model, data, cfg, show_progress_bar=False)
    for name, rows in zip(model.names, (x[0][mask.bool()], x[1], x[2].flatten(0, 1)), strict=True):
        _, _, exact = torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False)
        assert ((found[name].double() * exact[:2]).sum(1).abs() > 1 - 1e-6).all(), name
    ranks = peftfast.discover_ranks(model, peftfast.LoraConfig(r=2, target_modules=list(model.names)), data)
    assert sum(ranks.values()) == 6


def test_eva_states_that_do_not_fit_change_nothing():
    model = peftfast.get_peft_model(oracle.llama(), config(peftfast))

    def everything():
        cfg = model.peft_config["default"]
        return cfg.rank_pattern, cfg.alpha_pattern, {n: p.clone() for n, p in model.named_parameters()}

    state = peftfast.get_eva_state_dict(oracle.llama(), batches(), config(peftfast), show_progress_bar=False)
    before = everything()
    wrong = {**state, "model.layers.1.mlp.down_proj": torch.randn(3, 7)}
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj \[3, 7\], which needs \[rank, 64\]"):
        peftfast.initialize_lora_eva_weights(model, eva_state_dict=wrong)
    broken = {**state, "model.layers.1.mlp.down_proj": torch.full((3, 64), torch.nan)}
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj, which has NaN or infinite values"):
        peftfast.initialize_lora_eva_weights(model, eva_state_dict=broken)
    oracle_state, found = before[2], everything()
    assert found[:2] == before[:2] and found[2].keys() == oracle_state.keys()
    assert all(torch.equal(found[2][name], value) for name, value in oracle_state.items())
    misnamed = {name.replace("0.self_attn.q_proj", "0.self_attn.q_projX"): part for name, part in state.items()}
    with pytest.warns(peftfast.PeftWarning, match=r"does not have: '.*0.self_attn.q_projX'\. Did you mean '.*q_proj'"):
        peftfast.initialize_lora_eva_weights(model, eva_state_dict=misnamed)


def test_eva_does_not_begin_inside_the_weights():
    """Of what is merged the ranks cannot change, and new factors would not arrive."""
    model = initialised(peftfast)
    before = copy.deepcopy(model.peft_config["default"])
    with torch.no_grad():
        model.merge_adapter()
        expected = oracle.logits(model)
        for rank in (4, 5):
            state = {f"model.layers.0.self_attn.{name}": torch.ones(rank, 32) for name in ("q_proj", "k_proj")}
            with pytest.raises(ValueError, match="Cannot initialise adapter default while it is merged"):
                peftfast.initialize_lora_eva_weights(model, eva_state_dict=state)
        with pytest.raises(ValueError, match="Cannot initialise adapter default while it is merged"):
            peftfast.initialize_lora_eva_weights(model, [oracle.inputs(model)], show_progress_bar=False)
        assert model.peft_config["default"] == before and torch.equal(oracle.logits(model), expected)
        model.unmerge_adapter()
        torch.testing.assert_close(oracle.logits(model), expected)


# ---- CorDA -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("model", [oracle.llama, oracle.gpt2])
def test_corda_is_pefts(method, model, tmp_path):
    target = ["q_proj", "down_proj"] if model is oracle.llama else ["c_attn"]
    results = []
    for library, preprocess in ((peft, peft_preprocess_corda), (peftfast, peftfast.preprocess_corda)):
        settings = library.CordaConfig(corda_method=method) if library is peftfast else None
        if settings is None:
            from peft.tuners.lora.config import CordaConfig

            settings = CordaConfig(corda_method=method)
        cfg = library.LoraConfig(
            r=4, lora_alpha=4, target_modules=target, init_lora_weights="corda", corda_config=settings
        )
        base = model()
        untouched = oracle.logits(base)

        def run(base=base):
            for batch in batches(2, 1):
                base(batch["input_ids"])

        preprocess(base, cfg, run_model=run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = library.get_peft_model(base, cfg)
        assert not any(hasattr(m, "eigens") for m in base.modules())
        torch.testing.assert_close(oracle.logits(adapted), untouched, rtol=1e-3, atol=1e-3)
        results.append(adapted)
    theirs, ours = results
    for (name, layer), other in zip(
        ours.base_model.inventory.layers.items(),
        (m for m in theirs.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")),
        strict=True,
    ):
        delta, peer = (m.lora_B["default"].weight @ m.lora_A["default"].weight for m in (layer, other))
        # directions of nearly equal singular values may mix
        assert (delta - peer).norm() <= 0.05 * peer.norm(), name


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_corda_resolves_its_targets(targets):
    base, settings = oracle.llama(), peftfast.CordaConfig()
    cfg = peftfast.LoraConfig(r=4, target_modules=targets, init_lora_weights="corda", corda_config=settings)
    untouched = oracle.logits(base)
    peftfast.preprocess_corda(base, cfg, lambda: base(batches(1, 1)[0]["input_ids"]))
    assert len({name.rpartition(".")[2] for name in cfg.target_modules}) == (2 if targets is None else 7)
    adapted = peftfast.get_peft_model(base, cfg)
    torch.testing.assert_close(oracle.logits(adapted), untouched, rtol=1e-3, atol=1e-3)


def test_corda_caches_and_errors(tmp_path):
    settings = peftfast.CordaConfig(cache_file=tmp_path / "a" / "cache.pt", covariance_file=str(tmp_path / "cov.pt"))
    cfg = peftfast.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="corda", corda_config=settings)
    base = oracle.llama()
    with pytest.raises(ValueError, match="run preprocess_corda|run `preprocess_corda`"):
        peftfast.get_peft_model(oracle.llama(), copy.deepcopy(cfg))
    with pytest.raises(ValueError, match="run_model must be specified"):
        peftfast.preprocess_corda(base, cfg)
    with pytest.raises(ValueError, match="needs a config with `corda_config`"):
        peftfast.preprocess_corda(base, peftfast.LoraConfig(target_modules=["q_proj"]), run_model=int)
    with pytest.raises(ValueError, match="run_model gave these targets no input: .*layers.0.self_attn.q_proj"):
        peftfast.preprocess_corda(base, cfg, run_model=int)
    assert not any(tmp_path.iterdir())  # nothing of that is kept
    peftfast.preprocess_corda(base, cfg, run_model=lambda: base(batches(1, 1)[0]["input_ids"]))
    again = oracle.llama()
    peftfast.preprocess_corda(again, cfg)  # from the cache
    one, two = (peftfast.get_peft_model(m, copy.deepcopy(cfg)) for m in (base, again))
    torch.testing.assert_close(oracle.logits(one), oracle.logits(two), rtol=0, atol=0)
    two.save_pretrained(tmp_path / "adapter")  # a config with paths can be written
    assert oracle.saved_config(tmp_path / "adapter")["corda_config"]["cache_file"] == str(tmp_path / "a" / "cache.pt")


@pytest.mark.parametrize("wrong", ["targets", "rank"])
def test_corda_that_does_not_fit_leaves_the_base_alone(wrong):
    base = oracle.llama()
    before = copy.deepcopy(base.state_dict())
    cfg = oracle.quietly(peftfast.LoraConfig, r=4, target_modules=["q_proj"], init_lora_weights="corda")
    peftfast.preprocess_corda(base, cfg, lambda: base(batches(1, 1)[0]["input_ids"]))
    asked = copy.deepcopy(cfg)
    if wrong == "targets":
        asked.target_modules.add("o_proj")
    else:
        asked.rank_pattern = {"layers.1.self_attn.q_proj": 2}
    assert peftfast.plan_adapter(base, asked).refusal is None
    with pytest.raises(ValueError, match=r"_proj: .*`preprocess_corda`"):
        peftfast.get_peft_model(base, asked)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    peftfast.get_peft_model(base, cfg)  # what was prepared is still there


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_settings_that_are_not_given_are_the_default_ones(init):
    configs = []
    for library in (peftfast, peft):
        with pytest.warns(UserWarning, match=rf"but `{init}_config` is not specified. Using default \w+ config."):
            configs.append(library.LoraConfig(init_lora_weights=init).to_dict()[f"{init}_config"])
    assert configs[0] == configs[1]
    if init == "corda":
        base = oracle.llama()
        cfg = oracle.quietly(peftfast.LoraConfig, r=4, target_modules=["q_proj"], init_lora_weights="corda")
        peftfast.preprocess_corda(base, cfg, run_model=lambda: base(batches(1, 1)[0]["input_ids"]))
        peftfast.get_peft_model(base, cfg)


@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_corda_files_that_are_of_something_else(kind, tmp_path, monkeypatch):
    path = tmp_path / "found.pt"

    def preprocess(base, *targets):
        settings = peftfast.CordaConfig(**{kind: str(path)})
        cfg = peftfast.LoraConfig(r=4, target_modules=[*targets], init_lora_weights="corda", corda_config=settings)
        peftfast.preprocess_corda(base, cfg, run_model=lambda: base(batches(1, 1)[0]["input_ids"]))

    def refused(said, *targets):
        base = oracle.llama()
        with pytest.raises(ValueError, match=said):
            preprocess(base, *targets)
        assert not any(hasattr(m, "eigens") for m in base.modules())

    preprocess(oracle.llama(), "q_proj")
    refused(r"found.pt is of another model or other targets: .*fits '.*0.self_attn.v_proj'", "q_proj", "v_proj")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    refused("found.pt is damaged or no file of a calibration", "q_proj")
    path.write_bytes(whole)
    preprocess(oracle.llama(), "q_proj")
    found = torch.load(path)
    for wrong in ([1], {**found, "a": 1}):
        torch.save(wrong, path)
        refused("found.pt is no file of a calibration", "q_proj")
    found.popitem()
    torch.save(found, path)
    refused("found.pt is of another model or other targets: .*fits '.*1.self_attn.q_proj'", "q_proj")
    path.unlink()
    path.mkdir()
    refused("found.pt' is a folder", "q_proj")  # before anything is computed that could not be written
    path.rmdir()

    def full(tensors, target):
        with open(target, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="found.pt"):
        preprocess(oracle.llama(), "q_proj")
    assert list(tmp_path.iterdir()) == []


def test_corda_leaves_what_it_saw_where_that_is_asked_for():
    base, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.eye(4)
    settings = peftfast.CordaConfig(prune_temporary_fields=False)
    cfg = peftfast.LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda", corda_config=settings)
    peftfast.preprocess_corda(base, cfg, run_model=lambda: [base(x), base(3 * x), base(x)])
    torch.testing.assert_close(base[0].covariance_matrix, x)  # every sample is scaled by its largest entry
    base(x)
    assert base[0].sample_count == 3
