"""What is done with one adapter takes no more steps where many are beside it."""

import oracle
import pytest

import peftfast
from peftfast.files import fit
from peftfast.files.fingerprint import _same, _sample, fingerprint
from peftfast.interop import counterpart
from peftfast.many import hotswap
from peftfast.method import method_for
from peftfast.training.capture.mix import chosen_adapters
from peftfast.wrapping.listing import Listing

FEW, MANY = 3, 13
CONFIG = {"r": 2, "target_modules": "all-linear"}
KEPT = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
ROWS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [1, 2]}


def holding(count, options):
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**options), "a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", peftfast.LoraConfig(**options))
    return model.eval()


def disable(model):
    with model.disable_adapter():
        pass


#: in this order: some need what others have done
OPERATIONS = {
    "add": lambda model, folder, options: model.add_adapter("new", peftfast.LoraConfig(**options)),
    "delete": lambda model, folder, options: model.delete_adapter("new"),
    "plan": lambda model, folder, options: peftfast.plan_adapter(model, peftfast.LoraConfig(**options)),
    "load": lambda model, folder, options: model.load_adapter(folder / "a1", "loaded"),
    "set": lambda model, folder, options: model.set_adapter("a1"),
    "save": lambda model, folder, options: model.save_pretrained(folder, selected_adapters=["a1"]),
    "state dict": lambda model, folder, options: peftfast.get_peft_model_state_dict(model, adapter_name="a1"),
    "forward": lambda model, folder, options: oracle.logits(model),
    "disable": lambda model, folder, options: disable(model),
    "merge": lambda model, folder, options: model.merge_adapter(["a1"]),
    "unmerge": lambda model, folder, options: model.unmerge_adapter(),
    "hot-swap": lambda model, folder, options: peftfast.hotswap_adapter(model, folder / "a1", "a2"),
    "combine": lambda model, folder, options: model.add_weighted_adapter(["a1", "a2"], [0.5, 0.5], "both", "linear"),
}


@pytest.mark.parametrize(
    "options, left_out",
    [
        (CONFIG, ()),
        (KEPT, ("set",)),  # every copy of a module is frozen, which are few
        (ROWS, ("set", "hot-swap", "combine")),  # the latter are refused
    ],
    ids=["factors", "modules_to_save", "token rows"],
)
def test_steps_do_not_grow_with_the_number_of_adapters(options, left_out, tmp_path):
    models = [holding(count, options) for count in (FEW, MANY)]
    models[0].save_pretrained(tmp_path, selected_adapters=["a1"])
    grown = {}
    for name, operation in OPERATIONS.items():
        if name in left_out:
            continue
        few, many = (oracle.python_calls(lambda m=model, do=operation: do(m, tmp_path, options)) for model in models)
        if many > 1.1 * few:  # one factor more an adapter would be twice as many
            grown[name] = few, many
    assert not grown


def test_listing_a_model_takes_few_steps_a_module():
    """Neither is every module's parent looked for from the top, nor every module asked for what only layers have."""
    model = oracle.llama()
    count = len(list(model.modules()))
    assert oracle.python_calls(lambda: Listing(model)) < 5 * count


def test_the_record_of_a_base_asks_layers_few_times_what_they_are(monkeypatch):
    """Each answer of theirs looks for PEFT's class too."""
    model, asked = holding(1, CONFIG), []
    monkeypatch.setattr(counterpart, "_class_for", lambda layer: asked.append(layer) or type(layer))
    fingerprint(model.get_base_model())
    assert len(asked) < 2 * len(model.base_model.inventory.layers)


def test_the_record_of_the_same_base_is_compared_without_tensors():
    """Those of ten samples took longer than all else in comparing, a sixth of the time that a prompt takes to load."""
    there, here = (_sample(oracle.llama().lm_head) for _ in range(2))
    with oracle.Operations() as operations:
        assert _same(there, here)
    assert not operations.launched


def test_a_loss_asks_for_a_method_that_is_known():
    """And not all methods one by one whether they are it."""
    model = holding(1, CONFIG)
    batch = oracle.inputs(model)
    output = model(**batch, labels=batch["input_ids"])
    assert oracle.python_calls(lambda: model.base_model._with_loss_terms(output)) < 12


def test_names_for_a_recording_are_looked_up_on_the_host():
    tuner, (ids,) = holding(FEW, CONFIG).base_model, oracle.inputs(oracle.llama()).values()
    with oracle.Operations() as operations:
        places = chosen_adapters(tuner, ids, None, ["a2", "__base__"], ids.device)
    assert places.tolist() == [2, -1] and not operations.launched


def test_loading_looks_for_shared_rows_only_where_a_key_is_not_known(tmp_path, monkeypatch):
    """Which goes through the whole model twice, a fifth of the time that a prompt takes to load."""
    model, asked = holding(1, CONFIG), []
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(fit, "rows_said_twice", lambda *those: asked.append(those) or {})
    model.load_adapter(tmp_path / "a0", "a0")
    assert not asked


def test_a_hot_swap_looks_for_the_method_once(tmp_path, monkeypatch):
    """Not in every layer, where all methods would be asked one by one whether the config is theirs."""
    model, asked = holding(1, CONFIG), []
    model.save_pretrained(tmp_path, selected_adapters=["a0"])
    monkeypatch.setattr(hotswap, "method_for", lambda cfg: asked.append(cfg) or method_for(cfg))
    peftfast.hotswap_adapter(model, tmp_path / "a0", "a0")
    assert len(asked) == 1
