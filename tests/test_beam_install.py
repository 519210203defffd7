"""`mpmm.beam`: what installing changes, what uninstalling restores, and how workers get it.

Replacing Beam's modules affects the whole process, so most tests use subprocesses. Importing Beam takes
seconds, so each subprocess makes several observations.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness import import_path

from mpmm.beam import _is_worker_that_asks_for_us

pytestmark = pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs Apache Beam")

TIMEOUT_S = 300.0


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a new interpreter; its text on stdout. Fails the test, with its stderr, if it raises."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": import_path(), **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_install_nothing_of_beam_changes() -> None:
    run_python(
        """
        import sys
        import mpmm.beam

        assert not mpmm.beam.is_installed()
        assert not any(name.startswith("apache_beam") for name in sys.modules)
        mpmm.beam.uninstall()

        from apache_beam.ml.inference import base
        from apache_beam.utils.plugin import BeamPlugin

        assert base.multi_process_shared.__name__ == "apache_beam.utils.multi_process_shared"
        assert base.ModelManager is None or base.ModelManager.__module__.startswith("apache_beam")
        assert "__reduce_ex__" not in vars(base._RunInferenceDoFn)
        assert not any(path.startswith("mpmm") for path in BeamPlugin.get_all_plugin_paths())
        """
    )


def test_install_replaces_what_was_imported_before_and_uninstall_puts_all_of_it_back() -> None:
    run_python(
        """
        import sys, threading, types
        import apache_beam.ml.inference.sklearn_inference
        from apache_beam.ml.inference import base
        from apache_beam.utils import multi_process_shared as stock
        from apache_beam.utils.multi_process_shared import MultiProcessShared
        from apache_beam.utils.plugin import BeamPlugin
        import mpmm.beam, mpmm.model_manager, mpmm.multi_process_shared

        def state():
            modules = {n: m for n, m in sys.modules.items() if n.startswith("apache_beam")}
            names = {
                (n, a): id(v) for n, m in [*modules.items(), ("__main__", sys.modules["__main__"])]
                for a, v in vars(m).items() if isinstance(m, types.ModuleType) and not a.startswith("__")
            }
            carriers = {c: "__reduce_ex__" in vars(getattr(base, c)) for c in ("_RunInferenceDoFn", "OOMProtectedFn")}
            return names, {n: id(m) for n, m in modules.items()}, carriers, BeamPlugin.get_all_plugin_paths()

        threads = before = after = None
        before = state()
        threads = [threading.Thread(target=mpmm.beam.install) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()

        assert mpmm.beam.is_installed()
        assert base.ModelManager is mpmm.model_manager.ModelManager
        assert base.multi_process_shared is mpmm.multi_process_shared
        assert base.resource is not None
        assert MultiProcessShared is mpmm.multi_process_shared.MultiProcessShared
        import apache_beam.utils, apache_beam.ml.inference.model_manager as ours
        assert ours is mpmm.model_manager
        assert apache_beam.utils.multi_process_shared is mpmm.multi_process_shared
        assert apache_beam.ml.inference.model_manager is mpmm.model_manager
        from apache_beam.utils.multi_process_shared import MultiProcessShared as again
        assert again is MultiProcessShared
        assert "mpmm.beam.MpmmPlugin" in BeamPlugin.get_all_plugin_paths()
        assert getattr(sys.modules["apache_beam.utils.multi_process_shared"], "MultiProcessShared") is again

        del ours, again
        mpmm.beam.uninstall()
        mpmm.beam.uninstall()
        assert not mpmm.beam.is_installed()
        after, ignored = state(), {("__main__", name) for name in ("before", "after", "threads", "thread", "ignored")}
        for old, new in zip(before, after):
            if isinstance(old, dict):
                changed = {key for key in {*old, *new} if old.get(key) != new.get(key)} - ignored
                assert not changed, changed
            else:
                assert old == new
        """
    )


def test_log_levels_that_are_set_for_beams_modules_count_for_ours_until_uninstall() -> None:
    run_python(
        """
        import logging
        import mpmm.beam
        ours, proxy = logging.getLogger("mpmm"), logging.getLogger("mpmm.multi_process_shared.host")
        assert not ours.isEnabledFor(logging.INFO) and not proxy.isEnabledFor(logging.INFO)
        mpmm.beam.install()
        logging.getLogger("apache_beam.utils.multi_process_shared").setLevel(logging.DEBUG)
        assert not ours.isEnabledFor(logging.INFO) and proxy.isEnabledFor(logging.DEBUG)
        logging.getLogger("apache_beam.ml.inference.model_manager").setLevel(logging.INFO)
        assert ours.isEnabledFor(logging.INFO) and not ours.isEnabledFor(logging.DEBUG)
        logging.getLogger("mpmm").setLevel(logging.ERROR)
        assert not ours.isEnabledFor(logging.WARNING)
        logging.getLogger("mpmm").setLevel(logging.NOTSET)
        mpmm.beam.uninstall()
        assert not ours.isEnabledFor(logging.INFO) and not proxy.isEnabledFor(logging.INFO)
        """
    )


def test_beam_imported_after_install_finds_mpmm_and_after_uninstall_its_own() -> None:
    run_python(
        """
        import sys
        import mpmm.beam
        mpmm.beam.install()
        assert "torch" not in sys.modules

        from apache_beam.ml.inference import base
        from apache_beam.ml.inference.model_manager import ModelManager
        assert base.ModelManager is ModelManager and ModelManager.__module__.startswith("mpmm")
        assert base.multi_process_shared.__name__ == "mpmm.multi_process_shared"
        assert base.resource is not None

        mpmm.beam.uninstall()
        assert base.multi_process_shared.__name__ == "apache_beam.utils.multi_process_shared"
        try:
            from apache_beam.ml.inference.model_manager import ModelManager as stock
        except ImportError:
            stock = None
        assert base.ModelManager is stock
        assert (base.resource is None) == (stock is None)
        mpmm.beam.install()
        assert base.ModelManager is ModelManager
        """
    )


MAKE_PICKLES = """
    import pickle, sys
    from pathlib import Path
    import mpmm.beam
    mpmm.beam.install()
    from apache_beam.internal import pickler
    from apache_beam.ml.inference import base

    handler = base.ModelHandler()
    handler.something = [1, 2, 3]
    transform = base._RunInferenceDoFn(handler, "a clock", "metrics", True, "tag", True, {"memory_source": "host"})
    libraries = {"cloudpickle": pickler.dumps, "pickle": pickle.dumps}
    try:
        import dill
        libraries["dill"] = dill.dumps
    except ImportError:
        pass
    for name, dumps in libraries.items():
        Path(sys.argv[1], f"{name}.dofn").write_bytes(dumps(transform))
    # The object that a worker sends to a model server.
    Path(sys.argv[1], "pickle.loader").write_bytes(pickle.dumps(base.OOMProtectedFn(handler.load_model)))
"""
LOAD_PICKLE = """
    import pickle, sys
    from pathlib import Path
    assert "mpmm" not in sys.modules and "apache_beam" not in sys.modules
    path = Path(sys.argv[1])
    if path.name.startswith("pickle"):
        thing = pickle.loads(path.read_bytes())
    elif path.name.startswith("dill"):
        import dill
        thing = dill.loads(path.read_bytes())
    else:
        # What Beam's worker has imported when it unpickles: Beam, but not its inference.
        from apache_beam.internal import pickler
        assert "apache_beam.ml.inference.base" not in sys.modules
        thing = pickler.loads(path.read_bytes())

    import mpmm.beam
    from apache_beam.ml.inference import base
    assert mpmm.beam.is_installed()
    assert "torch" not in sys.modules
    assert base.ModelManager.__module__.startswith("mpmm")
    assert base.multi_process_shared.__name__ == "mpmm.multi_process_shared"
    if path.suffix == ".loader":
        assert type(thing) is base.OOMProtectedFn and thing.func.__name__ == "load_model"
    else:
        assert type(thing) is base._RunInferenceDoFn
        assert thing._model_handler.something == [1, 2, 3] and thing._clock == "a clock"
        assert thing.use_model_manager and thing._model_manager_args == {"memory_source": "host"}
        assert (thing._model_tag, thing._metrics_namespace, thing._load_model_at_runtime) == ("tag", "metrics", True)
    # And on from here, as a worker that starts a model server does.
    import copy
    assert type(copy.deepcopy(thing)) is type(thing)
    assert type(pickle.loads(pickle.dumps(thing, protocol=2))) is type(thing)
"""


def test_what_is_pickled_brings_the_installation_to_a_process_that_knows_nothing_of_it(tmp_path: Path) -> None:
    run_python(MAKE_PICKLES, str(tmp_path))
    pickles = sorted(tmp_path.iterdir())
    assert len(pickles) >= 3
    for path in pickles:
        run_python(LOAD_PICKLE, str(path))


CONTROL = {"CONTROL_API_SERVICE_DESCRIPTOR": "url: 'localhost:1'"}
NAMED = [
    {"beam_plugins": ["mpmm.beam"]},
    {"beam_plugins": ["other", "mpmm.beam.MpmmPlugin"]},
    {"beam_plugins": "mpmm.beam"},
    {"beam:option:beam_plugins:v1": ["mpmm.beam"]},
    {"options": {"beam_plugins": ["mpmm.beam"]}},
]
NOT_NAMED = [{}, {"beam_plugins": None}, {"beam_plugins": ["mpmm.beamish", "mpmm"]}, {"options": None}, ["mpmm.beam"]]


@pytest.mark.parametrize("options", NAMED, ids=json.dumps)
def test_a_worker_whose_options_name_the_plugin_asks_for_us(options: object, tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps(options))
    assert _is_worker_that_asks_for_us({**CONTROL, "PIPELINE_OPTIONS": json.dumps(options)})
    # As in Beam's worker, the file counts where there are both.
    assert _is_worker_that_asks_for_us({**CONTROL, "PIPELINE_OPTIONS": "{}", "PIPELINE_OPTIONS_FILE": os.fspath(file)})
    assert not _is_worker_that_asks_for_us({"PIPELINE_OPTIONS": json.dumps(options)}), "not a worker"


@pytest.mark.parametrize("options", NOT_NAMED, ids=json.dumps)
def test_a_worker_whose_options_do_not_name_the_plugin_does_not(options: object) -> None:
    assert not _is_worker_that_asks_for_us({**CONTROL, "PIPELINE_OPTIONS": json.dumps(options)})


def test_options_that_cannot_be_read_are_left_to_beam_to_complain_about(tmp_path: Path) -> None:
    assert not _is_worker_that_asks_for_us(CONTROL)
    assert not _is_worker_that_asks_for_us({**CONTROL, "PIPELINE_OPTIONS": "{"})
    assert not _is_worker_that_asks_for_us({**CONTROL, "PIPELINE_OPTIONS_FILE": os.fspath(tmp_path / "none")})


def test_beams_worker_installs_through_the_plugin_option() -> None:
    run_python(
        """
        import json, os, sys
        from apache_beam.runners.worker.sdk_worker_main import create_harness
        from apache_beam.ml.inference import base

        def start_worker(options):
            os.environ["PIPELINE_OPTIONS"] = json.dumps(options)
            os.environ["CONTROL_API_SERVICE_DESCRIPTOR"] = "url: 'localhost:1'"
            create_harness(os.environ, dry_run=True)

        start_worker({"beam_plugins": ["json"]})
        assert "mpmm.beam" not in sys.modules
        assert base.multi_process_shared.__name__ == "apache_beam.utils.multi_process_shared"
        # The name that runners which collect plugins pass on.
        start_worker({"beam:option:beam_plugins:v1": ["mpmm.beam.MpmmPlugin"]})
        assert sys.modules["mpmm.beam"].is_installed()
        assert base.ModelManager.__module__.startswith("mpmm")
        """
    )


def test_without_beam_the_error_says_what_to_install() -> None:
    run_python(
        """
        import sys
        sys.modules["apache_beam"] = None
        import mpmm.beam
        try:
            mpmm.beam.install()
        except ImportError as error:
            assert "pip install 'mpmm[beam]'" in str(error), error
        else:
            raise AssertionError("installed without Beam")
        assert not mpmm.beam.is_installed()
        """
    )


def test_a_beam_without_model_manager_gets_a_warning_and_the_other_half(tmp_path: Path) -> None:
    package = tmp_path / "apache_beam"
    for folder in ("ml/inference", "utils"):
        (package / folder).mkdir(parents=True)
    for name in ("ml", "utils"):
        (package / name / "__init__.py").touch()
    (package / "__init__.py").write_text("__version__ = '2.50.0'\n")
    (package / "ml/inference/__init__.py").write_text("from apache_beam.ml.inference import base\n")
    (package / "ml/inference/base.py").write_text(
        "from apache_beam.utils import multi_process_shared\nclass _RunInferenceDoFn: pass\n"
    )
    (package / "utils/multi_process_shared.py").write_text("class MultiProcessShared: pass\n")
    (package / "utils/plugin.py").write_text("class BeamPlugin: pass\n")
    run_python(
        """
        import sys, warnings
        sys.path.insert(0, sys.argv[1])
        import mpmm.beam
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mpmm.beam.install()
        messages = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
        assert len(messages) == 1 and "2.50.0" in messages[0] and "model_manager" in messages[0], messages
        from apache_beam.ml.inference import base
        assert base.multi_process_shared.__name__ == "mpmm.multi_process_shared"
        mpmm.beam.uninstall()
        assert base.multi_process_shared.__name__ == "apache_beam.utils.multi_process_shared"
        """,
        os.fspath(tmp_path),
    )
