"""Where PEFT is not installed, peftfast answers to its name by itself, also towards modules that have looked before."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

import peft
import pytest
from processes import run

from peftfast.interop import absent, alias, early

SCRIPT = Path(__file__).parent / "scripts" / "without_peft.py"
CHECKS = {
    "everybody_recognises_the_model": None,
    "checkpoints_are_adapters_and_resume": None,
    "the_best_model_is_loaded": None,
    "a_quantised_model_trains": "bitsandbytes",
    "what_is_saved_loads": None,
    "transformers_takes_a_config": None,
    "trl_takes_a_config_and_a_model": "trl",
    "accelerate_trains_and_saves": None,
}  # what each needs besides


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the script says of its checks, with the others imported before or after; one process an order."""

    @functools.cache
    def of(order: str) -> dict[str, str | None]:
        folder = tmp_path_factory.mktemp(order)
        run(["-m", "training.hide_peft", SCRIPT, order], folder)
        return json.loads((folder / "result.json").read_text())

    return of


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_training(order, check, outcomes):
    if CHECKS[check]:
        pytest.importorskip(CHECKS[check])
    error = outcomes(order)[check]
    assert error is None, error


MODEL = """
import importlib.util, logging, sys, torch
from training.hide_peft import hide
hide()
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("peftfast").addHandler(handler)
logging.getLogger("peftfast").setLevel(logging.INFO)
import peftfast
def model():
    config = peftfast.LoraConfig(target_modules=["0"])
    return peftfast.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
def served():
    return importlib.util.find_spec("peft") is not None
assert not served()
"""


def test_once_for_all_threads_and_given_back(tmp_path):
    code = """
import pickle, threading
from peftfast.interop import alias
threads = [threading.Thread(target=model) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert served() and sum(isinstance(f, alias.PeftFinder) for f in sys.meta_path) == 1
assert len(said) == 1 and "PEFTFAST_AS_PEFT=never" in said[0], said
import importlib.metadata, peft, transformers.utils
importlib.metadata.version("peft")
assert peft.PeftModel is peftfast.PeftModel and transformers.utils.is_peft_available()
with open("model.pickle", "wb") as f:
    pickle.dump(model(), f)
alias.uninstall()
model()
assert not served() and not transformers.utils.is_peft_available() and "peft" not in sys.modules
import peftfast.as_peft, peft
alias.install()  # as a script does that `peftfast run` has started
assert served() and transformers.utils.is_peft_available() and sys.modules["peft"] is peft
"""
    run(["-c", MODEL + code], tmp_path)
    run(["-c", MODEL + "import pickle; pickle.load(open('model.pickle', 'rb')); assert served()"], tmp_path)


def test_declining(tmp_path):
    never = "model(); assert not served() and not said\nimport peftfast.as_peft; assert served()"
    run(["-c", MODEL + never], tmp_path, PEFTFAST_AS_PEFT="never")
    wrong = """
try:
    model()
except ValueError as e:
    assert str(e) == "PEFTFAST_AS_PEFT: unknown value 'no'; one of 'auto', 'never'", e
else:
    raise SystemExit("not refused")
assert not served()
"""
    run(["-c", MODEL + wrong], tmp_path, PEFTFAST_AS_PEFT="no")
    before = "from peftfast.interop import alias\nalias.uninstall(); model(); assert not served()"
    run(["-c", MODEL + before], tmp_path)
    somebodys = """
sys.modules["peft"] = type(sys)("peft")
before = dict(vars(sys.modules["peft"]))
model()
assert vars(sys.modules["peft"]) == before and not said
"""
    run(["-c", MODEL + somebodys], tmp_path)


def test_a_library_that_keeps_its_answer_is_named(tmp_path):
    """diffusers looks once, when it is imported."""
    Path(tmp_path, "settled.py").write_text("def is_peft_available(): return False\n")
    run(["-c", MODEL + "import settled; model(); assert served() and 'not told any more: settled' in said[0]"],
        tmp_path)  # fmt: skip
    code = """
import settled
try:
    import peftfast.as_peft
except ImportError as e:
    assert "settled has been imported already" in str(e), e
else:
    raise SystemExit("not refused")
assert not served()
"""
    run(["-c", MODEL + code], tmp_path)


def test_nothing_happens_where_peft_is_installed(tmp_path):
    code = """
import importlib.util, logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
import transformers.utils
import peftfast
finders, cached = list(sys.meta_path), transformers.utils.is_peft_available.cache_info()
peftfast.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peftfast.LoraConfig(target_modules=["0"]))
assert sys.meta_path == finders and "peft" not in sys.modules
assert "peftfast" not in importlib.util.find_spec("peft").origin
assert transformers.utils.is_peft_available.cache_info() == cached
"""
    assert "peftfast" not in run(["-c", code], tmp_path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a loaded module of a source that ran while there was no `peft`."""

    def make(source: str, **namespace) -> types.ModuleType:
        path = tmp_path / "looked_early.py"
        path.write_text(source)
        made = types.ModuleType("looked_early")
        made.__file__ = str(path)
        vars(made).update({"is_peft_available": lambda: False, **namespace})
        monkeypatch.setitem(sys.modules, "looked_early", made)
        return made

    return make


def test_what_is_bound_in_a_module_that_looked_early(module):
    made = module(
        """
from typing import TYPE_CHECKING
if is_peft_available() and True:
    import peft.utils, peft_like
    import peft.utils.other as other, json, peft.no_such_module as no_module
    from peft import (
        LoraConfig as Config,
        PeftModel,  # a comment
        ThereIsNoSuchName,
    )
    from peft.no_such_module import Nothing
    if True:
        from peft.tuners.tuners_utils import BaseTunerLayer
    from peft_like import Thing
    try:
        import no_such_module
    except ImportError:
        from peft import IA3Config
    with suppress(ImportError):
        from peft import AdaLoraConfig
elif TYPE_CHECKING:
    from .peft import AnotherLibrary
else:
    PeftMixedModel = None
try:
    from peft import PeftMixedModel, PeftConfig
except ImportError:
    pass
def later():
    from peft import PeftType
class C:
    from peft import TaskType
""",
        PeftMixedModel=None,
        PeftConfig="its own",
    )
    before = dict(vars(made))
    early.Missing().bind()
    bound = {name: value for name, value in vars(made).items() if before.get(name) is not value}
    unknown = {name: bound.pop(name) for name in ("ThereIsNoSuchName", "Nothing", "no_module")}
    assert bound == {
        "peft": peft,
        "other": peft.utils.other,
        "Config": peft.LoraConfig,
        "PeftModel": peft.PeftModel,
        "PeftMixedModel": peft.PeftMixedModel,
        "BaseTunerLayer": peft.tuners.tuners_utils.BaseTunerLayer,
        "IA3Config": peft.IA3Config,
        "AdaLoraConfig": peft.AdaLoraConfig,
    }
    assert unknown.pop("no_module") is absent.placeholder("peft.no_such_module")
    assert unknown == {name: absent.placeholder(name) for name in unknown}
    assert not isinstance(1, unknown["Nothing"])
    with pytest.raises(NotImplementedError, match="ThereIsNoSuchName"):
        unknown["ThereIsNoSuchName"]()


def test_modules_that_cannot_be_read_are_left(module):
    made = module("from peft import PeftModel (")
    early.Missing().bind()
    made.__file__ = "nowhere.py"
    early.Missing().bind()
    assert not hasattr(made, "PeftModel")


def test_answers_are_forgotten(module):
    answers = [False, True]
    question = functools.lru_cache(lambda: answers.pop(0))
    version = functools.lru_cache(lambda: "none")
    module("", is_peft_available=question, is_peft_version=version)
    assert not question() and version() == "none"
    early.forget_answers()
    assert question() and version.cache_info().currsize == 0


def test_a_question_of_another_kind_is_not_asked_twice(module):
    module("", is_peft_available=lambda model: False)
    assert not early.denying()
    module("", is_peft_available=lambda: False)
    assert early.denying() == [__name__]


def test_the_name_is_not_vacant_here(caplog):
    with caplog.at_level(logging.INFO, "peftfast"):
        alias.take_if_vacant()
    assert not alias.is_installed() and importlib.util.find_spec("peft") is peft.__spec__
    assert not caplog.records
