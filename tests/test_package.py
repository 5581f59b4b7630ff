"""What the package promises beside its arithmetic: a light import, examples that run, one version."""

import doctest
import importlib
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import gpu_arrays
import lookstep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_lookstep_imports_numpy_and_nothing_else():
    code = """if True:
        import sys, numpy
        before = set(sys.modules)
        import lookstep
        print({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"""
    assert python(code) == "{'lookstep'}\n"


def test_importing_lookstep_leaves_the_process_as_it_was():
    code = """if True:
        import locale, resource, signal, sys, threading, numpy
        def process():
            handlers = [signal.getsignal(s) for s in signal.valid_signals()]
            tiny = numpy.float32(1e-40) * numpy.float32(1) > 0
            limits = [resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT")]
            threads = open("/proc/self/status").read().partition("Threads:")[2].split()[0]
            return handlers, tiny, limits, threads, locale.setlocale(locale.LC_ALL), numpy.geterr(), sys.excepthook
        before = process()
        import lookstep
        opt = lookstep.Optimizer(numpy.ones(10), lookstep.Adam())
        opt.step(numpy.ones(10))
        print(process() == before)"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    assert python(code) == "True\n"


def need(framework):
    """Skips what cannot run without a framework."""
    if framework == "gpu":
        gpu_arrays.device()
    elif framework:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        pytest.importorskip(framework, reason=f"{framework} is not installed")


FRAMEWORKS = ["keras", "optax", "thinc", "torch"]
"""Those with an adapter; what runs them does so in a process of its own, for they do not all go together."""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_is_imported_when_it_is_first_used(framework):
    need(framework)
    code = f"""if True:
        import sys
        import lookstep as ls
        before = {framework!r} in sys.modules
        ls.{framework}
        print(before, {framework!r} in sys.modules)"""
    assert python(code) == "False True\n"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_its_framework_an_adapter_says_what_to_install(framework):
    code = f"""if True:
        import sys
        sys.modules[{framework!r}] = None
        import lookstep as ls
        try:
            ls.{framework}
        except ImportError as error:
            print(error)"""
    assert f'pip install "lookstep[{framework}]"' in python(code)


@pytest.mark.parametrize("framework", ["keras", "optax", "jax", "thinc", "torch", "wgpu"])
def test_a_framework_is_named_in_one_place(framework):
    place = {"jax": "optax", "wgpu": "gpu"}.get(framework, framework)
    root = Path(lookstep.__file__).parent
    imports = re.compile(rf"^\s*(import|from) {framework}\b", re.MULTILINE)
    found = {path.relative_to(root).parts[0] for path in root.rglob("*.py") if imports.search(path.read_text("utf-8"))}
    assert {Path(name).stem for name in found} == {place}


MODULES = ["lookstep", *(module.name for module in pkgutil.walk_packages(lookstep.__path__, "lookstep."))]
MODULES = [name for name in MODULES if not name.endswith(("_core", "__main__"))]


def framework_of(module):
    return next((framework for framework in FRAMEWORKS if f"lookstep.{framework}" in module), None)


@pytest.mark.parametrize("name", [name for name in MODULES if not framework_of(name)])
def test_examples_in_docstrings_run(name):
    need("gpu" if ".gpu" in name else None)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_examples_in_docstrings_of_adapters_run(framework):
    need(framework)
    code = f"""if True:
        import doctest, importlib
        for name in {[name for name in MODULES if framework_of(name) == framework]}:
            failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
            print(bool(tried), failed)"""
    results = python(code).splitlines()
    assert "True 0" in results
    assert set(results) <= {"True 0", "False 0"}


@pytest.mark.parametrize("name", lookstep.__all__)
def test_what_is_public_is_documented(name):
    public = getattr(lookstep, name)
    if isinstance(public, ModuleType):
        classes = [value for value in vars(public).values() if isinstance(value, type) and not issubclass(value, tuple)]
        ours = [value for value in classes if value.__module__.startswith(public.__name__)]
        examples = [value for value in ours if not value.__subclasses__()]
        assert examples
    else:
        examples = [public] if isinstance(public, type) else []
    for value in [public, *examples]:
        assert value.__doc__
    assert all("Example:" in value.__doc__ for value in examples)


PAGES = {"README": None, "migration": None, "scikit-learn": "sklearn"}
"""What the examples of a page need, where its name does not say it."""


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_python_in_the_pages_runs(page, tmp_path, monkeypatch):
    need(PAGES.get(Path(page).stem, Path(page).stem))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert snippets
    if Path(page).stem in FRAMEWORKS:
        python("\n".join(snippets))
        return
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)


def test_files_that_the_readme_links_to_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    links += re.findall(r'src="([^"]+)"', README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_version_is_that_of_the_crate():
    version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
    assert version == lookstep.__version__ == importlib.metadata.version("lookstep")


def test_the_package_says_that_it_is_typed():
    assert (Path(lookstep.__file__).parent / "py.typed").exists()
