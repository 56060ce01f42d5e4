"""A wheel and a source release hold what they need, and building them needs neither torch nor Horovod."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from horovod_jobs import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.xdist_group("packaging")]  # built once


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """The names in a source release, those in the wheel that is built from it, its metadata, and where it is unpacked."""
    out = tmp_path_factory.mktemp("releases")
    compiler = out / "compiler"  # the kernels are built, but nobody waits for them to be fast
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    command, environment = [sys.executable, "-m", "build", "--outdir", out, ROOT], {"CC": str(compiler), "CXX": str(compiler)}
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "*****" not in result.stdout + result.stderr, "setuptools warns"
    with tarfile.open(next(out.glob("*.tar.gz"))) as source:
        source_names = {name.partition("/")[2] for name in source.getnames()}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(out / "unpacked")
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    return source_names, names, metadata, out / "unpacked"


def tracked(*patterns):
    return set(subprocess.check_output(["git", "ls-files", *patterns], cwd=ROOT, text=True).split())


def test_source_release_is_complete(releases):
    expected = tracked(
        "ds_horovod", "csrc", "tests", "benchmarks", "docs", "examples", "scripts", "Makefile", "README.md", "setup.py"
    )
    assert expected and not expected - releases[0]


def test_wheel_holds_the_package_and_its_kernels(releases):
    _, names, metadata, _ = releases
    assert not tracked("ds_horovod") - names
    assert any(name.startswith("ds_horovod/_cpu.") and name.endswith(".so") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"ds_horovod", "ds_horovod.egg"}
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.3", "Requires-Dist: numpy"]


def test_wheel_finds_the_cuda_sources_that_it_compiles(releases):
    families = [name for name in tracked("csrc/cuda") if name.endswith(".cu")]
    script = f"""
from ds_horovod.kernels import launch
assert launch.__file__.startswith({str(releases[3])!r})
for family in {[name.split("/")[-1].removesuffix(".cu") for name in families]}:
    assert "__global__" in launch.sources(family)
"""
    assert families
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=releases[3], env={**os.environ, "PYTHONPATH": str(releases[3])}
    )


def test_sources_without_kernels_say_what_they_are(tmp_path):
    """As in the clone, where the current folder comes first, after the package was installed elsewhere."""
    copied = shutil.copytree(ROOT / "ds_horovod", tmp_path / "ds_horovod", ignore=shutil.ignore_patterns("*.so"))
    # The finders of an editable installation would give the sources what belongs to others.
    script = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import ds_horovod"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert f"ImportError: ds_horovod was imported from its sources, {copied}" in result.stderr
